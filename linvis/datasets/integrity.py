"""Tell from the bytes of a picture or label map whether it is whole and can be decoded."""

import io

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

JPEG_START, JPEG_END, JPEG_SCAN = b'\xff\xd8', b'\xff\xd9', 0xDA
PNG_START, PNG_END = b'\x89PNG\r\n\x1a\n', b'IEND\xaeB`\x82'
# Pillow's names of the one-channel modes of at most 8 bits.
LABEL_MODES = ('1', 'L', 'P')


def find_damage(data: bytes) -> str | None:
    """Look for what decoders pass over in silence: an empty file, a JPEG or PNG without its end.

    OpenCV fills the missing part of a truncated JPEG with grey and reports nothing. Other formats
    are left to the decoder.

    Args:
        data: The content of the file.

    Returns:
        What is wrong, or None.
    """
    if not data:
        return 'the file is empty'
    if data.startswith(JPEG_START) and not _jpeg_is_whole(data):
        return 'the JPEG is truncated (no end-of-image marker)'
    if data.startswith(PNG_START) and data.rfind(PNG_END) < 0:
        return 'the PNG is truncated (no IEND chunk)'
    return None


def _jpeg_is_whole(data: bytes) -> bool:
    """Walk the segments up to the first scan, then look for the end-of-image marker.

    The end marker alone proves nothing: an embedded thumbnail has one of its own. Inside a scan
    the marker cannot occur by chance, because the format escapes the byte 0xFF there.
    """
    position = len(JPEG_START)
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        length = int.from_bytes(data[position + 2 : position + 4], 'big')
        position += 2 + length
        if marker == JPEG_SCAN:
            return data.find(JPEG_END, position) >= 0
    return False


def find_picture_fault(data: bytes) -> str | None:
    """Return what keeps the content from being a whole picture that OpenCV decodes, or None."""
    damage = find_damage(data)
    if damage:
        return damage
    try:
        picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error as error:
        return f'OpenCV cannot decode it ({error.err})'
    return 'OpenCV cannot decode it' if picture is None else None


def find_label_fault(data: bytes, max_label: int | None = None) -> str | None:
    """Return what keeps the content from being a whole 8-bit label map, or None.

    Args:
        data: The content of the file.
        max_label: The largest label allowed; None allows all of 0 to 255.
    """
    damage = find_damage(data)
    if damage:
        return damage
    try:
        with Image.open(io.BytesIO(data)) as picture:
            if picture.mode not in LABEL_MODES:
                return f'a label map has one 8-bit channel, this picture has mode {picture.mode}'
            largest = int(np.asarray(picture).max())
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError) as error:
        return f'Pillow cannot decode it ({error})'
    if max_label is not None and largest > max_label:
        return f'labels go up to {max_label}, this map has {largest}'
    return None
