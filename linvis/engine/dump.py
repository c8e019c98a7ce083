"""Writing predictions to a file."""

from collections.abc import Sequence
from typing import Any

from mmengine.evaluator import DumpResults

from linvis.registry import METRICS


@METRICS.register_module()
class DumpSegResults(DumpResults):
    """DumpResults for segmentation: predicted label maps without scores and ground truth.

    The scores of one ADE20K picture take about 200 MB; the labels take 0.3 MB.
    """

    def process(self, data_batch: Any, predictions: Sequence[dict]) -> None:
        """Keeps label maps and names of a batch."""
        dropped = ('seg_logits', 'gt_sem_seg')
        kept = [
            {key: value for key, value in sample.items() if key not in dropped}
            for sample in predictions
        ]
        super().process(data_batch, kept)
