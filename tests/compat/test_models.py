"""The three libraries build a model each, take a training step and predict."""

import mmdet
import mmpretrain.models
import mmseg
import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import InstanceData, PixelData
from mmpretrain.structures import DataSample
from mmseg.structures import SegDataSample

SIZE = (64, 96)
BATCH_NORM = {'type': 'BN'}


def model_config(library, name):
    return Config.fromfile(f'{library.__path__[0]}/.mim/configs/{name}.py').model


def train_and_predict(scope, config, data):
    """One backward pass that must reach the parameters, then the predictions."""
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope(scope):
        model = MODELS.build(config)
        model.init_weights()
        batch = model.data_preprocessor(data, training=True)
        loss, _ = model.parse_losses(model.train()(**batch, mode='loss'))
        loss.backward()
        assert loss.isfinite()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert any(gradient.any() for gradient in gradients)
        with torch.no_grad():
            return model.eval().test_step(data)


def picture():
    return torch.randint(0, 256, (3, *SIZE), dtype=torch.uint8)


def shapes():
    names = ('img_shape', 'ori_shape', 'pad_shape', 'batch_input_shape')
    return {**dict.fromkeys(names, SIZE), 'scale_factor': (1.0, 1.0)}


def detection_data():
    boxes = torch.tensor([[5.0, 5, 60, 60], [30, 20, 90, 50]])
    masks = np.zeros((2, *SIZE), dtype=np.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    sample = DetDataSample(metainfo=shapes())
    sample.gt_instances = InstanceData(
        bboxes=boxes, labels=torch.tensor([1, 2]), masks=BitmapMasks(masks, *SIZE)
    )
    sample.ignored_instances = InstanceData(bboxes=boxes[:0], labels=torch.zeros(0).long())
    return {'inputs': [picture()], 'data_samples': [sample]}


def small_resnet(config, channels):
    config.backbone.update(depth=18, init_cfg=None, norm_cfg=BATCH_NORM)
    config.neck.in_channels = channels


@pytest.mark.parametrize('nms', ['nms', 'soft_nms'])
def test_mask_rcnn_trains_and_predicts(nms):
    config = model_config(mmdet, 'mask_rcnn/mask-rcnn_r50_fpn_1x_coco')
    small_resnet(config, [64, 128, 256, 512])
    config.test_cfg.rcnn.update(score_thr=0.0, nms={'type': nms, 'iou_threshold': 0.5})
    (result,) = train_and_predict('mmdet', config, detection_data())
    found = result.pred_instances
    assert len(found) == 100
    assert found.masks.shape == (100, *SIZE)
    assert found.scores.isfinite().all()


def test_deformable_detr_trains_and_predicts():
    config = model_config(mmdet, 'deformable_detr/deformable-detr_r50_16xb2-50e_coco')
    small_resnet(config, [128, 256, 512])
    config.update(num_queries=20)
    config.encoder.num_layers = config.decoder.num_layers = 1
    (result,) = train_and_predict('mmdet', config, detection_data())
    assert len(result.pred_instances) == 100


def test_retinanet_trains_and_predicts():
    config = model_config(mmdet, 'retinanet/retinanet_r50_fpn_1x_coco')
    small_resnet(config, [64, 128, 256, 512])
    config.test_cfg.score_thr = 0.0
    (result,) = train_and_predict('mmdet', config, detection_data())
    assert len(result.pred_instances) == 100


def test_classifier_trains_and_predicts():
    config = model_config(mmpretrain, 'resnet/resnet18_8xb32_in1k')
    config.data_preprocessor = {'type': 'ClsDataPreprocessor', 'num_classes': 1000}
    samples = [DataSample().set_gt_label(label) for label in (3, 5)]
    data = {'inputs': torch.stack([picture(), picture()]), 'data_samples': samples}
    results = train_and_predict('mmpretrain', config, data)
    assert [tuple(result.pred_score.shape) for result in results] == [(1000,), (1000,)]


def test_upernet_trains_and_predicts():
    config = model_config(mmseg, 'upernet/upernet_r18_4xb4-80k_ade20k-512x512')
    config.update(pretrained=None)
    config.data_preprocessor.size = SIZE
    for part in (config.backbone, config.decode_head, config.auxiliary_head):
        part.norm_cfg = BATCH_NORM
    config.decode_head.channels = config.auxiliary_head.channels = 32
    samples = []
    for _ in range(2):
        sample = SegDataSample(metainfo=shapes())
        sample.gt_sem_seg = PixelData(data=torch.randint(0, 150, (1, *SIZE)))
        samples.append(sample)
    data = {'inputs': [picture(), picture()], 'data_samples': samples}
    results = train_and_predict('mmseg', config, data)
    assert [tuple(result.pred_sem_seg.shape) for result in results] == [SIZE, SIZE]
