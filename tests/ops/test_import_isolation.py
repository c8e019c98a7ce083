"""linvis_ops needs torch alone, and importing it touches nothing else."""

import subprocess
import sys


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd='/'
    ).stdout


def test_import_brings_in_no_framework_and_compiles_nothing():
    code = """
import sys, linvis_ops
print(sorted({name.split('.')[0] for name in sys.modules} & {
    'linvis', 'mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'timm', 'cv2'}))
print('linvis_ops.bi_wkv.kernels_triton' in sys.modules)
"""
    import linvis_ops

    folder = linvis_ops.__path__[0].rsplit('/', 1)[0]
    assert run(f'import sys; sys.path.insert(0, {folder!r})\n{code}').split('\n')[:2] == [
        '[]',
        'False',
    ]


def test_works_without_triton():
    import linvis_ops

    folder = linvis_ops.__path__[0].rsplit('/', 1)[0]
    code = f"""
import sys; sys.path.insert(0, {folder!r}); sys.modules['triton'] = None
import torch, linvis_ops
k = torch.randn(1, 5, 4)
linvis_ops.bi_wkv(torch.ones(4), torch.ones(4), k, k)
print(linvis_ops.available_backends('bi_wkv')['triton'])
"""
    assert run(code).startswith('triton cannot be imported')
