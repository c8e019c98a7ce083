"""Where the packages lie, and the CUDA extension on request; all metadata is in pyproject.toml."""

import os
import sys
from typing import Any

from setuptools import find_packages, setup


def cuda_extension() -> dict[str, Any]:
    """Arguments of setup for `linvis_ops._C`; none unless LINVIS_BUILD_CUDA=1."""
    asked = os.environ.get('LINVIS_BUILD_CUDA', '')
    if asked not in ('', '0', '1'):
        sys.exit(f'LINVIS_BUILD_CUDA must be 1 (build the CUDA extension) or 0, not {asked!r}.')
    if asked != '1':
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CUDAExtension
    except ModuleNotFoundError as error:
        sys.exit(
            f'LINVIS_BUILD_CUDA=1 needs PyTorch in the environment that builds ({error}): install '
            'it, and give pip the option --no-build-isolation.'
        )

    os.environ.setdefault('TORCH_CUDA_ARCH_LIST', '8.0;9.0+PTX')
    extension = CUDAExtension(
        'linvis_ops._C',
        [
            'ops/csrc/module.cpp',
            'ops/csrc/bi_wkv.cu',
            'ops/csrc/bi_wkv_stream.cu',
            'ops/csrc/bi_wkv_stream_backward.cu',
        ],
        depends=[
            'ops/csrc/bi_wkv.h',
            'ops/csrc/bi_wkv_worker.h',
            'ops/csrc/bi_wkv_division.h',
            'ops/csrc/bi_wkv_stream.h',
            'ops/csrc/bi_wkv_stream_backward.h',
            'ops/csrc/bi_wkv_stream_backward_block.h',
            'ops/csrc/bi_wkv_stream_backward_rows.h',
            'ops/csrc/bi_wkv_stream_block.h',
            'ops/csrc/bi_wkv_stream_host.h',
            'ops/csrc/bi_wkv_stream_pairs.h',
            'ops/csrc/bi_wkv_stream_ptx.h',
            'ops/csrc/bi_wkv_stream_rows.h',
            'ops/csrc/bi_wkv_stream_sums.h',
        ],
        extra_compile_args={'cxx': ['-O2'], 'nvcc': ['-O3']},
    )
    return {'ext_modules': [extension], 'cmdclass': {'build_ext': BuildExtension}}


setup(
    packages=[
        *find_packages('.', include=['linvis', 'linvis.*']),
        *find_packages('ops', include=['linvis_ops', 'linvis_ops.*']),
    ],
    package_dir={'linvis': 'linvis', 'linvis_ops': 'ops/linvis_ops'},
    **cuda_extension(),
)
