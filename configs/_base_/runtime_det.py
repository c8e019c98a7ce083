"""Runtime of mmdet, with the curves also in TensorBoard's format."""

_base_ = 'mmdet::_base_/default_runtime.py'

vis_backends = [dict(type='LocalVisBackend'), dict(type='TensorboardVisBackend')]
visualizer = dict(vis_backends=vis_backends)
