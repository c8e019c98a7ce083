"""Drawings of predictions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mmcv
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmengine.visualization import Visualizer

from linvis.registry import HOOKS

# Pictures are enlarged to this long side in pixels, so that text on small ones can be read.
LONG_SIDE = 320


@HOOKS.register_module()
class ClassDrawingHook(Hook):
    """Draws tested pictures with their predicted and true class into a folder.

    mmpretrain's own hook draws what enters the network, a crop whose red and blue are swapped.

    Args:
        out_dir: Folder of the drawings, one `<folder of the picture>_<its name>.png` each.
    """

    def __init__(self, out_dir: str) -> None:
        self.out_dir = Path(out_dir)

    def after_test_iter(
        self,
        runner: Runner,  # noqa: ARG002
        batch_idx: int,
        data_batch: Any = None,  # noqa: ARG002
        outputs: Sequence[Any] | None = None,
    ) -> None:
        """Draw the pictures of one batch."""
        visualizer = Visualizer.get_current_instance()
        for data_sample in outputs or ():
            path = Path(data_sample.img_path)
            image = mmcv.imread(str(path), channel_order='rgb')
            visualizer.visualize_cls(
                image,
                data_sample,
                rescale_factor=LONG_SIDE / max(image.shape[:2]),
                out_file=str(self.out_dir / f'{path.parent.name}_{path.stem}.png'),
                name=path.stem,
                step=batch_idx,
            )
