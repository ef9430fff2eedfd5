"""How a photograph is to be turned: what its file says of that, kept when its pixels change."""

from __future__ import annotations

from typing import Any

from PIL import ExifTags, Image

UPRIGHT = 1


def orientation_of(image: Image.Image) -> int:
    """An image's orientation, 1 to 8 as EXIF has it; upright where it says nothing or nonsense."""
    try:
        orientation: Any = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged EXIF raises many kinds
        return UPRIGHT
    return int(orientation) if orientation in range(2, 9) else UPRIGHT


def exif_of(orientation: int) -> dict[Any, bytes]:  # Pillow has other keys than text
    """EXIF that says nothing else, as Pillow's images hold it and its `save` takes it; or none."""
    if orientation == UPRIGHT:
        return {}
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return {"exif": exif.tobytes()}
