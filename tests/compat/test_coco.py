"""COCO metrics of mmdet are the same numbers with pycocotools and with faster-coco-eval."""

import json
from pathlib import Path

import numpy as np
import pytest
from faster_coco_eval import COCO

from linvis.compat.coco_eval import OfficialCOCOeval

MINI = Path(__file__).parents[2] / 'data/mini/coco/annotations/instances_val2017.json'

EVALUATE = r"""
import contextlib, io, json, sys, warnings
import numpy as np
import torch
from linvis.compat import install
from linvis.compat.coco import install_coco_eval
from linvis.compat.mmcv_ext import install_mmcv_ext
from linvis.compat.optional import install_imgaug

package, folder, *names = sys.argv[1:]
if package == 'faster-coco-eval':
    install()
else:
    install_mmcv_ext()
    install_imgaug()

from mmdet.evaluation.metrics import coco_metric
from mmdet.evaluation import CocoMetric

# The metric rounds to three digits: keep what it rounds.
class Recording(coco_metric.COCOeval):
    def summarize(self):
        super().summarize()
        name = self.params.iouType + str(self.params.useCats)
        exact[name + '/stats'] = np.asarray(self.stats, dtype=float).tolist()
        exact[name + '/precision'] = np.asarray(self.eval['precision']).mean((0, 1)).tolist()
        exact[name + '/recall'] = np.asarray(self.eval['recall']).mean(0).tolist()

items = ['mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l',
         'AR@100', 'AR@300', 'AR@1000', 'AR_s@1000', 'AR_m@1000', 'AR_l@1000']
module = coco_metric.COCOeval.__module__
coco_metric.COCOeval = Recording
outcome = {}
for name in names:
    exact, rounded = {}, {}
    annotations = f'{folder}/{name}_annotations.json'
    content = json.load(open(annotations))
    predictions = json.load(open(f'{folder}/{name}_detections.json'))
    for metrics, classwise in ((['bbox', 'segm'], True), (['proposal'], False)):
        metric = CocoMetric(annotations, metrics, classwise=classwise,
                            metric_items=items if classwise else None)
        metric.dataset_meta = {'classes': tuple(c['name'] for c in content['categories'])}
        for image in content['images']:
            found = np.array(predictions[str(image['id'])], dtype=np.float32).reshape(-1, 6)
            masks = np.zeros((len(found), image['height'], image['width']), dtype=bool)
            for mask, row in zip(masks, found):
                x1, y1, x2, y2 = row[:4].astype(int)
                mask[y1:y2, x1:x2] = True
                mask[y1:y1 + 3, x1:x1 + 5] = False
            found = torch.from_numpy(found)
            metric.process({}, [{
                'img_id': image['id'],
                'ori_shape': masks.shape[1:],
                'pred_instances': {
                    'bboxes': found[:, :4],
                    'scores': found[:, 4],
                    'labels': found[:, 5].long(),
                    'masks': torch.from_numpy(masks),
                },
            }])
        rounded.update(metric.evaluate(len(content['images'])))
    outcome[name] = {'exact': exact, 'rounded': rounded}
outcome['module'], outcome['late'] = module, install_coco_eval()
with open(f'{folder}/{package}.json', 'w') as file:
    json.dump(outcome, file)
"""


def polygon(x, y, w, h):
    return [x, y, x + w, y, x + w, y + h / 2, x + w / 2, y + h, x, y + h]


def synthetic(seed=0):
    """Pictures with polygons, crowds and run-lengths; one is empty, and one class."""
    rng = np.random.default_rng(seed)
    images, annotations = [], []
    for image in range(1, 9):
        images.append({'id': image, 'file_name': f'{image}.jpg', 'height': 240, 'width': 320})
        for _ in range(0 if image == 3 else 8):
            w, h = np.exp(rng.uniform(2, 5, 2)).round(2).tolist()
            x, y = (rng.uniform(0, 1, 2) * (320 - w, 240 - h)).round(2).tolist()
            crowd = int(rng.random() < 0.15)
            if crowd:
                mask = np.zeros((240, 320), dtype=np.uint8)
                mask[int(y) : int(y + h), int(x) : int(x + w)] = 1
                runs = np.flatnonzero(np.diff(mask.T.ravel(), prepend=0, append=2))
                counts = np.diff(runs, prepend=0).tolist()
                segmentation = {'size': [240, 320], 'counts': counts}
            else:
                segmentation = [polygon(x, y, w, h)]
            annotations.append(
                {
                    'id': len(annotations) + 1,
                    'image_id': image,
                    'category_id': int(rng.choice([1, 3, 7])),
                    'bbox': [x, y, w, h],
                    'area': w * h * 0.75,
                    'iscrowd': crowd,
                    'segmentation': segmentation,
                }
            )
    categories = [{'id': i, 'name': f'class {i}'} for i in (1, 3, 5, 7)]
    return {'images': images, 'annotations': annotations, 'categories': categories}


def detections_for(content, seed=0, noise=0.08):
    """Boxes near the annotations, doubled, of the wrong class, and at random; some scores tie.

    One picture has more than a hundred of them, one has none.
    """
    rng = np.random.default_rng(seed)
    labels = {category['id']: i for i, category in enumerate(content['categories'])}
    found = {}
    for number, image in enumerate(content['images']):
        rows = []
        for annotation in (a for a in content['annotations'] if a['image_id'] == image['id']):
            x, y, w, h = annotation['bbox']
            for _ in range(rng.integers(0, 3)):
                label = labels[annotation['category_id']]
                if rng.random() < 0.1:
                    label = int(rng.integers(len(labels)))
                dx, dy, dw, dh = rng.normal(0, noise, 4) * (w, h, w, h)
                corners = [x + dx, y + dy, x + w + dx + dw, y + h + dy + dh]
                rows.append([*corners, round(float(rng.random()), 1), label])
        for _ in range(150 if number == 0 else 4):
            x, y = rng.uniform(0, 0.8, 2) * (image['width'], image['height'])
            w, h = rng.uniform(4, 60, 2)
            label = int(rng.integers(len(labels)))
            rows.append([x, y, x + w, y + h, float(rng.random()) / 2, label])
        limits = [image['width'], image['height']] * 2
        rows = [[*np.clip(row[:4], 0, limits).tolist(), *row[4:]] for row in rows]
        found[str(image['id'])] = [] if number == 1 else rows
    return found


@pytest.fixture(scope='module')
def outcomes(run_python, tmp_path_factory):
    folder = tmp_path_factory.mktemp('coco')
    contents = {'synthetic': synthetic()}
    if MINI.exists():
        contents['real'] = json.loads(MINI.read_text())
    for name, content in contents.items():
        (folder / f'{name}_annotations.json').write_text(json.dumps(content))
        (folder / f'{name}_detections.json').write_text(json.dumps(detections_for(content)))
    for package in ('pycocotools', 'faster-coco-eval'):
        run_python(EVALUATE, package, folder, *contents)
    return [
        json.loads((folder / f'{package}.json').read_text())
        for package in ('pycocotools', 'faster-coco-eval')
    ]


@pytest.mark.parametrize('name', ['synthetic', 'real'])
def test_coco_metric_is_that_of_pycocotools(outcomes, name):
    if name == 'real' and not MINI.exists():
        pytest.skip('the mini data sets are not there')
    slow, fast = (outcome[name] for outcome in outcomes)
    assert slow['exact'].keys() == fast['exact'].keys()
    assert {key.partition('/')[0] for key in slow['exact']} == {'bbox1', 'segm1', 'bbox0'}
    for key, numbers in slow['exact'].items():
        np.testing.assert_allclose(fast['exact'][key], numbers, rtol=0, atol=1e-12, err_msg=key)
    assert len(slow['exact']['segm1/stats']) == 12
    assert 0.05 < slow['exact']['segm1/stats'][0] < 0.95
    np.testing.assert_equal(fast['rounded'], slow['rounded'])


def test_coco_metric_ran_with_the_package_that_install_names(outcomes):
    slow, fast = outcomes
    assert slow['module'] == 'pycocotools.cocoeval'
    assert fast['module'] == 'linvis.compat.coco_eval'
    # mmdet, once imported with pycocotools, keeps it
    assert (slow['late'], fast['late']) == ('pycocotools', 'faster-coco-eval')


def test_evaluation_by_many_processes_is_the_fast_one():
    from mmdet.datasets.api_wrappers import COCOeval, COCOevalMP

    assert COCOevalMP is COCOeval is OfficialCOCOeval


def test_ap_without_a_count_of_100_is_unknown_as_in_pycocotools():
    content = synthetic()
    rows = detections_for(content)['1']
    found = [
        {
            'image_id': 1,
            'category_id': content['categories'][label]['id'],
            'bbox': [x1, y1, x2 - x1, y2 - y1],
            'score': score,
        }
        for x1, y1, x2, y2, score, label in rows
    ]
    truth = COCO(content)
    evaluation = OfficialCOCOeval(truth, truth.loadRes(found), 'bbox')
    evaluation.params.maxDets = [10, 300, 1000]
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == -1
    assert 0 < evaluation.stats[1] < 1
