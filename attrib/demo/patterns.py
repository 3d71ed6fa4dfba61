"""Pictures without a subject: weaves, tiles, glyphs, flowing strokes, each drawn anew with every seed."""

import math

import numpy as np

from attrib.demo.canvas import TAU, Canvas, mix


def weave(canvas: Canvas) -> None:
    """Warp and weft of two to four coloured threads each, over and under by a twill of random step."""
    num_threads = int(canvas.rng.integers(8, 19))
    warp = [canvas.accent() for _ in range(int(canvas.rng.integers(2, 5)))]
    weft = [canvas.accent() for _ in range(int(canvas.rng.integers(1, 4)))] + [canvas.palette.light]
    step, over, gap = int(canvas.rng.integers(2, 5)), int(canvas.rng.integers(1, 3)), canvas.between(0.04, 0.16)
    band = int(canvas.rng.integers(1, 4))
    cell = 1 / num_threads
    canvas.backdrop(canvas.palette.ink, canvas.palette.ink)
    for row in range(num_threads):
        for column in range(num_threads):
            left, top = column * cell, row * cell
            lifted = (row + column) % step < over
            tone = warp[column // band % len(warp)] if lifted else weft[row // band % len(weft)]
            inset_x, inset_y = (gap * cell, 0) if lifted else (0, gap * cell)
            canvas.box(left + inset_x, top + inset_y, left + cell - inset_x, top + cell - inset_y, tone)
            glint = mix(tone, canvas.palette.light, 0.25)
            if lifted:
                canvas.box(left + cell * 0.3, top, left + cell * 0.5, top + cell, glint)
            else:
                canvas.box(left, top + cell * 0.3, left + cell, top + cell * 0.5, glint)


def stripes(canvas: Canvas) -> None:
    """Bands along one direction, straight or wavy, of uneven width."""
    canvas.backdrop(canvas.palette.ground, canvas.palette.ground_far)
    angle, wave, height = canvas.rng.random(), canvas.between(0.8, 3.0), canvas.rng.choice([0.0, 0.03, 0.08])
    sharp = canvas.chance(0.3)
    cos, sin = math.cos(TAU * angle), math.sin(TAU * angle)
    along = np.linspace(-0.8, 0.8, 60)
    phase = along * wave % 1
    swing = height * (4 * abs(phase - 0.5) - 1 if sharp else np.sin(TAU * phase))
    position = -0.85
    while position < 0.85:
        width = canvas.between(0.02, 0.13)
        tone = canvas.accent() if canvas.chance(0.8) else canvas.palette.ink
        low = np.stack([along, position + swing], 1)
        high = np.stack([along, position + width + swing], 1)[::-1]
        turned = np.concatenate([low, high]) @ np.array([[cos, sin], [-sin, cos]]) + 0.5
        canvas.polygon([tuple(point) for point in turned.tolist()], tone)
        position += width + canvas.between(0.0, 0.08)


def dots(canvas: Canvas) -> None:
    """A jittered grid of discs, rings or balls whose size follows a slow wave."""
    canvas.backdrop(canvas.palette.ground, canvas.palette.ground_far, canvas.rng.random())
    num_rows, jitter, kind = int(canvas.rng.integers(4, 11)), canvas.between(0, 0.3), canvas.rng.integers(3)
    wave_x, wave_y, phase = canvas.between(-1.2, 1.2), canvas.between(-1.2, 1.2), canvas.rng.random()
    pair = (canvas.accent(), canvas.accent())
    stagger = canvas.chance(0.5)
    for row in range(num_rows):
        for column in range(-1, num_rows + 1):
            x = (column + 0.5 + 0.5 * (stagger and row % 2) + canvas.between(-jitter, jitter)) / num_rows
            y = (row + 0.5 + canvas.between(-jitter, jitter)) / num_rows
            swell = 0.5 + 0.5 * math.sin(TAU * (wave_x * x + wave_y * y + phase))
            radius = (0.15 + 0.33 * swell) / num_rows
            tone = mix(*pair, swell)
            if kind == 0:
                canvas.disc(x, y, radius, tone)
            elif kind == 1:
                canvas.disc(x, y, radius, tone)
                canvas.disc(x, y, radius * 0.55, canvas.palette.ground)
            else:
                canvas.ball(x, y, radius, tone)


def tiles(canvas: Canvas) -> None:
    """A tiled floor: one random cell of wedges, arcs and diamonds, repeated with quarter turns."""
    num_rows = int(canvas.rng.choice([2, 3, 4, 5]))
    cell = 1 / num_rows
    ground, first, second = canvas.palette.ground, canvas.accent(), canvas.accent()
    kinds, turning, line = (
        canvas.rng.integers(5, size=2),
        int(canvas.rng.integers(4)),
        mix(canvas.palette.ink, ground, 0.2),
    )
    for row in range(num_rows):
        for column in range(num_rows):
            left, top = column * cell, row * cell
            canvas.box(left, top, left + cell, top + cell, (ground, mix(ground, first, 0.3))[(row + column) % 2])
            turn = (turning * (row + 2 * column)) % 4
            corners = [(left, top), (left + cell, top), (left + cell, top + cell), (left, top + cell)]
            a, b, c, d = corners[turn:] + corners[:turn]
            middle = (left + cell / 2, top + cell / 2)
            kind = kinds[(row + column) % 2]
            if kind == 0:
                canvas.polygon([a, b, c], first)
                canvas.disc(*middle, cell * 0.18, second)
            elif kind == 1:
                start = 90 * turn
                for share, tone in ((1.0, first), (0.66, ground), (0.4, second)):
                    reach = cell * share
                    canvas.draw.pieslice(
                        canvas.px([(a[0] - reach, a[1] - reach), (a[0] + reach, a[1] + reach)]),
                        start,
                        start + 90,
                        fill=tone,
                    )
            elif kind == 2:
                sides = [((p[0] + q[0]) / 2, (p[1] + q[1]) / 2) for p, q in ((a, b), (b, c), (c, d), (d, a))]
                canvas.polygon(sides, first)
                canvas.polygon(
                    [(middle[0] + (x - middle[0]) * 0.5, middle[1] + (y - middle[1]) * 0.5) for x, y in sides], second
                )
            elif kind == 3:
                canvas.polygon([a, b, middle], first)
                canvas.polygon([c, d, middle], second)
            else:
                for k in range(8):
                    canvas.petal(*middle, k / 8, cell * 0.46, cell * 0.17, (first, second)[k % 2])
    if canvas.chance(0.5):
        for k in range(num_rows + 1):
            canvas.line([(k * cell, 0), (k * cell, 1)], line, 0.012)
            canvas.line([(0, k * cell), (1, k * cell)], line, 0.012)


def glyphs(canvas: Canvas) -> None:
    """Lines of an invented script: every sign is two or three strokes on a grid of nine points."""
    canvas.backdrop(canvas.palette.ground, canvas.palette.ground_far, canvas.rng.random())
    num_rows = int(canvas.rng.choice([1, 2, 3, 4]))
    size = 0.86 / num_rows
    ink, weight = mix(canvas.accent(), canvas.palette.ink, canvas.between(0, 0.8)), size * canvas.between(0.07, 0.15)
    slant = canvas.between(-0.2, 0.2)
    for row in range(num_rows):
        for column in range(num_rows):
            left, top = 0.07 + column * size + 0.12 * size, 0.07 + row * size + 0.12 * size
            tone = canvas.accent() if canvas.chance(0.2) else ink

            def at(place: int, left=left, top=top) -> tuple[float, float]:
                x, y = place % 3 / 2, place // 3 / 2
                return left + size * 0.72 * (x + slant * (0.5 - y)), top + size * 0.72 * y

            for _ in range(int(canvas.rng.integers(2, 4))):
                kind = canvas.rng.integers(4)
                places = canvas.rng.permutation(9)[:3]
                if kind < 2:
                    canvas.line([at(int(place)) for place in places], tone, weight)
                elif kind == 2:
                    (x, y), radius = at(4), size * canvas.between(0.2, 0.36)
                    start = 90 * int(canvas.rng.integers(4))
                    frame = canvas.px([(x - radius, y - radius), (x + radius, y + radius)])
                    canvas.draw.arc(
                        frame,
                        start,
                        start + 90 * int(canvas.rng.integers(2, 5)),
                        fill=tone,
                        width=round(weight * canvas.side_px),
                    )
                else:
                    canvas.disc(*at(int(places[0])), weight * 0.9, tone)


def flow(canvas: Canvas) -> None:
    """Brush strokes that follow a smooth random field of directions."""
    canvas.backdrop(canvas.palette.ground, canvas.palette.ground_far, canvas.rng.random())
    waves = canvas.rng.uniform(-1.3, 1.3, size=(3, 2))
    phases, heights = canvas.rng.random(3), canvas.rng.uniform(0.05, 0.25, 3)
    bend, weight = canvas.rng.random(), canvas.between(0.008, 0.03)
    num_strokes = int(canvas.between(50, 120))
    heads = canvas.rng.random((num_strokes, 2))
    trails = [heads]
    for _ in range(14):
        turns = bend + (heights * np.sin(TAU * (trails[-1] @ waves.T + phases))).sum(1)
        trails.append(trails[-1] + 0.03 * np.stack([np.cos(TAU * turns), np.sin(TAU * turns)], 1))
    for points in np.stack(trails, 1).tolist():
        canvas.line(
            [tuple(point) for point in points],
            mix(canvas.accent(), canvas.palette.ink, canvas.between(0, 0.3)),
            weight * canvas.between(0.5, 1.5),
        )


def blocks(canvas: Canvas) -> None:
    """A rectangle divided again and again, its parts filled with colour, arcs and bars."""
    canvas.backdrop(canvas.palette.ink, canvas.palette.ink)
    parts, line = [(0.0, 0.0, 1.0, 1.0)], canvas.between(0.004, 0.018)
    while len(parts) < 5 + canvas.rng.integers(9):
        areas = [(right - left) * (bottom - top) for left, top, right, bottom in parts]
        left, top, right, bottom = parts.pop(int(np.argmax(areas)))
        cut = canvas.between(0.3, 0.7)
        if right - left > bottom - top:
            middle = left + cut * (right - left)
            parts += [(left, top, middle, bottom), (middle, top, right, bottom)]
        else:
            middle = top + cut * (bottom - top)
            parts += [(left, top, right, middle), (left, middle, right, bottom)]
    for left, top, right, bottom in parts:
        tone = canvas.accent() if canvas.chance(0.6) else mix(canvas.palette.ground, canvas.accent(), 0.15)
        canvas.box(left + line, top + line, right - line, bottom - line, tone)
        x, y, radius = (left + right) / 2, (top + bottom) / 2, min(right - left, bottom - top) * 0.38
        kind = canvas.rng.integers(5)
        if kind == 0:
            canvas.disc(x, y, radius, canvas.accent())
            canvas.disc(x, y, radius * 0.5, tone)
        elif kind == 1:
            start = 90 * int(canvas.rng.integers(4))
            canvas.draw.pieslice(
                canvas.px([(x - radius, y - radius), (x + radius, y + radius)]),
                start,
                start + 180,
                fill=canvas.palette.light,
            )
        elif kind == 2:
            for bar_y in np.linspace(top + 0.03, bottom - 0.03, 5):
                canvas.line([(left + 0.03, bar_y), (right - 0.03, bar_y)], canvas.palette.ink, 0.012)


def mandala(canvas: Canvas) -> None:
    """Rings of petals, discs and rays about one centre, with one order of symmetry."""
    canvas.backdrop(canvas.palette.ground, canvas.palette.ground_far, canvas.rng.random())
    order, turn = int(canvas.rng.integers(5, 17)), canvas.rng.random()
    x, y = canvas.between(0.44, 0.56), canvas.between(0.44, 0.56)
    for radius in np.linspace(canvas.between(0.46, 0.58), 0.1, int(canvas.rng.integers(3, 6))):
        kind, tone, span = canvas.rng.integers(4), canvas.accent(), radius * 5 / order
        if canvas.chance(0.4):
            canvas.disc(x, y, radius * 0.9, mix(canvas.accent(), canvas.palette.ground, 0.5))
        for k in range(order):
            angle = turn + k / order
            if kind < 2:
                canvas.petal(x, y, angle, radius, span * canvas.palette.light[0] / 255, tone)
            elif kind == 2:
                canvas.disc(
                    x + 0.85 * radius * math.cos(TAU * angle),
                    y + 0.85 * radius * math.sin(TAU * angle),
                    span * 0.3,
                    tone,
                )
            else:
                canvas.line(
                    [(x, y), (x + radius * math.cos(TAU * angle), y + radius * math.sin(TAU * angle))], tone, span * 0.2
                )
        turn += 0.5 / order
    canvas.disc(x, y, canvas.between(0.03, 0.08), canvas.palette.ink)


PATTERNS = {
    "weaves": weave,
    "stripes": stripes,
    "dots": dots,
    "tiles": tiles,
    "glyphs": glyphs,
    "flows": flow,
    "blocks": blocks,
    "mandalas": mandala,
}
