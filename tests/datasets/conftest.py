"""Files that data sets hold in practice, good and bad."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SIZE = (48, 32)  # width, height


def encode(mode: str = 'RGB', kind: str = 'JPEG', **options: object) -> bytes:
    """Return a picture of noise, so that its code is long."""
    rng = np.random.default_rng(0)
    channels = {'RGB': (3,), 'CMYK': (4,)}.get(mode, ())
    dtype, high = (np.uint16, 2**16) if mode == 'I;16' else (np.uint8, 2**8)
    array = rng.integers(0, high, (SIZE[1], SIZE[0], *channels)).astype(dtype)
    buffer = io.BytesIO()
    picture = Image.fromarray(array, 'CMYK') if mode == 'CMYK' else Image.fromarray(array)
    picture = picture.convert('P') if mode == 'P' else picture
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by a quarter
    return encode(exif=exif)


def with_thumbnail() -> bytes:
    """Return a JPEG whose EXIF segment embeds a whole JPEG, as cameras write them."""
    data, thumbnail = encode(), encode('L')
    segment = b'Exif\x00\x00' + thumbnail
    length = (len(segment) + 2).to_bytes(2, 'big')
    return data[:2] + b'\xff\xe1' + length + segment + data[2:]


GOOD = {
    'rgb.jpg': encode,
    'progressive.jpg': lambda: encode(progressive=True),
    'grey.jpg': lambda: encode('L'),
    'cmyk.jpg': lambda: encode('CMYK'),
    'rotated.jpg': rotated,
    'thumbnail.jpg': with_thumbnail,
    'padded.jpg': lambda: encode() + b'\0' * 9,
    'palette.png': lambda: encode('P', 'PNG'),
    'rgb.png': lambda: encode(kind='PNG'),
    'sixteen.png': lambda: encode('I;16', 'PNG'),
    'png.jpg': lambda: encode(kind='PNG'),
    'rgb.bmp': lambda: encode(kind='BMP'),
}
BAD = {
    'empty.jpg': (lambda: b'', 'empty'),
    'half.jpg': (lambda: encode()[: len(encode()) // 2], 'truncated'),
    'head.jpg': (lambda: encode()[:4], 'truncated'),
    'last_byte.jpg': (lambda: encode()[:-1], 'truncated'),
    'half_thumbnail.jpg': (lambda: with_thumbnail()[:-20], 'truncated'),
    'half.png': (lambda: encode(kind='PNG')[:-20], 'truncated'),
    'page.jpg': (lambda: b'<html>not found</html>', 'cannot decode'),
    'half.bmp': (lambda: encode(kind='BMP')[:40], 'cannot decode'),
}


@pytest.fixture(params=GOOD)
def good_file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / request.param
    path.write_bytes(GOOD[request.param]())
    return path


@pytest.fixture(params=BAD)
def bad_file(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    content, reason = BAD[request.param]
    path = tmp_path / request.param
    path.write_bytes(content())
    return path, reason


@pytest.fixture
def picture_bytes() -> Callable[..., bytes]:
    return encode


@pytest.fixture
def label_bytes() -> Callable[..., bytes]:
    def make(largest: int = 150, size: tuple[int, int] = SIZE) -> bytes:
        labels = np.random.default_rng(1).integers(0, largest, (size[1], size[0]), dtype=np.uint8)
        labels[0, 0] = largest
        buffer = io.BytesIO()
        Image.fromarray(labels).save(buffer, 'PNG')
        return buffer.getvalue()

    return make
