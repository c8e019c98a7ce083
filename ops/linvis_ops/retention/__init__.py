from linvis_ops.retention.interface import retention, retention_with_state

__all__ = ['retention', 'retention_with_state']
