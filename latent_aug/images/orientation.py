"""The EXIF orientation of photographs, read from a file and kept when pixels change."""

from __future__ import annotations

from typing import Any

from PIL import ExifTags, Image

UPRIGHT = 1


def read_orientation(image: Image.Image) -> int:
    """Read the EXIF orientation of an image, 1 to 8. Missing or damaged ones are upright."""
    try:
        orientation: Any = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged EXIF raises many kinds
        return UPRIGHT
    return int(orientation) if orientation in range(2, 9) else UPRIGHT


def make_exif(orientation: int) -> dict[Any, bytes]:  # Pillow has other keys than text
    """Make EXIF of an orientation alone, as Pillow's `save` takes it, or none for upright."""
    if orientation == UPRIGHT:
        return {}
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return {"exif": exif.tobytes()}
