"""Contact sheets: images and captions side by side in a labelled grid."""

import math
from bisect import bisect_right
from collections.abc import Collection, Sequence

from PIL import Image, ImageDraw, ImageFont, ImageOps

Cell = Image.Image | str | None

PAGE, PANEL, INK, FAINT = "#ffffff", "#f3f4f6", "#1f2328", "#6b7280"
# Pillow's own font has no Hangul: these are the fonts of Windows, macOS and Linux
KOREAN = ("malgun.ttf", "AppleSDGothicNeo.ttc", "NotoSansCJK-Regular.ttc", "NanumGothic.ttf")


def contact_sheet(
    rows: Sequence[Sequence[Cell]],
    column_titles: Sequence[str],
    row_titles: Sequence[str] | None = None,
    cell: int = 256,
    title: str = "",
) -> Image.Image:
    """An RGB image of a grid with cells of `cell` x `cell` pixels.

    Images keep their aspect ratio, text is wrapped, None stays empty."""
    gap, margin, size = cell // 20, cell // 8, max(11, cell // 15)
    beside = _title_width(row_titles or [], size, cell)
    left = margin + (beside + gap if beside else 0)
    heading = 3 * size if title else 0
    titles = _tallest(column_titles, size, cell) + gap if any(column_titles) else 0
    top = margin + heading + titles
    width = left + len(column_titles) * (cell + gap) - gap + margin
    sheet = Image.new("RGB", (width, top + len(rows) * (cell + gap) - gap + margin), PAGE)
    draw = ImageDraw.Draw(sheet)

    if title:
        draw.text((margin, margin), title, INK, _font(title, round(1.5 * size)))
    for column, text in enumerate(column_titles):
        _text(draw, text, (left + column * (cell + gap), top - titles, cell, titles - gap), size, FAINT)
    for row, cells in enumerate(rows):
        y = top + row * (cell + gap)
        if beside:
            _text(draw, row_titles[row], (margin, y, beside, cell), size, FAINT)
        for column, content in zip(range(len(column_titles)), cells, strict=True):
            _cell(sheet, content, left + column * (cell + gap), y, cell, size)
    return sheet


def labelled(image: Image.Image, text: str, side: int = 256) -> Image.Image:
    """The image, its longer side `side` pixels, with `text` beneath it."""
    fitted = ImageOps.contain(image.convert("RGB"), (side, side), Image.Resampling.LANCZOS)
    size = max(11, side // 15)
    height = _tallest([text], size, fitted.width) + size // 2
    whole = Image.new("RGB", (fitted.width, fitted.height + height), PANEL)
    whole.paste(fitted, (0, 0))
    _text(ImageDraw.Draw(whole), text, (0, fitted.height, fitted.width, height), size, INK)
    return whole


def montage(images: Sequence[Image.Image], framed: Collection[int] = ()) -> Image.Image:
    """RGB images of about one size in a grid about as wide as high; those with the numbers `framed` have a frame."""
    columns = math.ceil(math.sqrt(len(images)))
    width, height = (max(image.size[axis] for image in images) for axis in (0, 1))
    gap = max(4, width // 32)
    rows = math.ceil(len(images) / columns)
    grid = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), PANEL)
    draw = ImageDraw.Draw(grid)
    for i, image in enumerate(images):
        x, y = gap + i % columns * (width + gap), gap + i // columns * (height + gap)
        if i in framed:
            draw.rectangle((x - gap, y - gap, x + width + gap - 1, y + height + gap - 1), INK)
        grid.paste(image, (x, y))
    return grid


def _cell(sheet: Image.Image, content: Cell, x: int, y: int, cell: int, size: int) -> None:
    draw = ImageDraw.Draw(sheet)
    draw.rectangle((x, y, x + cell - 1, y + cell - 1), PANEL)
    if isinstance(content, str):
        inset = cell // 12
        _text(draw, content, (x + inset, y + inset, cell - 2 * inset, cell - 2 * inset), size, INK)
    elif content is not None:
        fitted = ImageOps.contain(content.convert("RGB"), (cell, cell), Image.Resampling.LANCZOS)
        sheet.paste(fitted, (x + (cell - fitted.width) // 2, y + (cell - fitted.height) // 2))


def _text(draw: ImageDraw.ImageDraw, text: str, box: tuple[int, int, int, int], size: int, colour: str) -> None:
    """Draw wrapped text, left-aligned and vertically centred; long text is set smaller, and cut off at 9 px."""
    x, y, width, height = box
    for smaller in range(size, 8, -1):
        font, line = _font(text, smaller), round(1.4 * smaller)
        lines = _wrap(text, font, width)
        if len(lines) * line <= height:
            break
    room = max(1, height // line)
    if len(lines) > room:
        lines[room - 1 :] = [lines[room - 1][:-1] + "…"]
    start = y + (height - len(lines) * line) // 2
    for number, words in enumerate(lines):
        draw.text((x, start + number * line), words, colour, font)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines of at most `width` pixels, broken at spaces, and inside words that are wider than a line."""
    lines = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            if line and font.getlength(f"{line} {word}") > width:
                lines.append(line)
                line = ""
            line = f"{line} {word}" if line else word
            while font.getlength(line) > width and len(line) > 1:
                fits = max(1, bisect_right(range(1, len(line)), width, key=lambda n: font.getlength(line[:n])))
                lines.append(line[:fits])
                line = line[fits:]
        lines.append(line)
    return lines


def _tallest(texts: Sequence[str], size: int, width: int) -> int:
    """Height in pixels of the longest of `texts` when wrapped."""
    return max((len(_wrap(text, _font(text, size), width)) for text in texts), default=0) * round(1.4 * size)


def _title_width(texts: Sequence[str], size: int, cell: int) -> int:
    return min(cell, max((round(_font(text, size).getlength(text)) + 1 for text in texts), default=0))


def _font(text: str, size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font; for Hangul a font of the system, without which boxes replace the characters."""
    if any("\u1100" <= letter <= "\ud7ff" for letter in text):
        for name in KOREAN:
            try:
                return ImageFont.truetype(name, size)
            except OSError:
                continue
    return ImageFont.load_default(size)
