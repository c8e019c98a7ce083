"""Evaluation of faster-coco-eval with the summary of pycocotools; needs faster-coco-eval."""

from faster_coco_eval.core.faster_eval_api import COCOeval

# COCO's AP counts the hundred best detections of a class in a picture.
_MAX_DETECTIONS = 100


class OfficialCOCOeval(COCOeval):
    """COCOeval whose AP counts a hundred detections, whatever the largest of `params.maxDets` is.

    pycocotools computes the first number of its summary so, and -1 if 100 is not among
    `params.maxDets`; faster-coco-eval takes the largest of them. mmdet asks for 100, 300 and 1000.
    All other numbers are the same.
    """

    def summarize(self) -> None:
        """Fill `stats` from the accumulated results, and print it."""
        super().summarize()
        if self.params.iouType not in ('bbox', 'segm'):
            return
        if _MAX_DETECTIONS not in self.params.maxDets:
            self.stats[0] = -1
            return
        # (IoU thresholds, recalls, classes, areas, counts of detections); -1 where nothing is known
        column = list(self.params.maxDets).index(_MAX_DETECTIONS)
        precision = self.eval['precision'][:, :, :, 0, column]
        known = precision[precision > -1]
        self.stats[0] = known.mean() if known.size else -1
