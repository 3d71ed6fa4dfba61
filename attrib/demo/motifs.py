"""Pictures of things: landscapes, towns, flowers, faces, animals, each drawn anew with every seed."""

import math

import numpy as np

from attrib.demo.canvas import TAU, Canvas, mix


def ridge(canvas: Canvas, base: float, height: float, roughness: int) -> list[tuple[float, float]]:
    """A horizon line: `roughness` random waves of falling height above `base`."""
    x = np.linspace(0, 1, 60)
    y = np.full_like(x, base)
    for wave in range(1, roughness + 1):
        y -= height / wave * np.sin(TAU * (canvas.between(0.4, 0.9) * wave * x + canvas.rng.random()))
    return list(zip(x.tolist(), y.tolist()))


def hills(canvas: Canvas) -> None:
    palette = canvas.palette
    canvas.backdrop(palette.ground, mix(palette.ground_far, canvas.accent(), 0.5))
    x, y, radius = canvas.between(0.15, 0.85), canvas.between(0.15, 0.42), canvas.between(0.06, 0.16)
    sun = mix(canvas.accent(), palette.light, 0.35)
    canvas.disc(x, y, radius * 1.35, mix(palette.ground, sun, 0.35))
    canvas.disc(x, y, radius, sun)
    near, far = canvas.accent(), mix(palette.ground_far, canvas.accent(), 0.55)
    num_ridges = int(canvas.rng.integers(3, 6))
    roughness = int(canvas.rng.choice([2, 3, 8]))
    for i in range(num_ridges):
        depth = i / (num_ridges - 1)
        line = ridge(canvas, 0.45 + 0.4 * depth, canvas.between(0.05, 0.12), roughness)
        tone = mix(far, mix(near, palette.ink, 0.5), depth)
        canvas.polygon([(0, 1), *line, (1, 1)], tone)
        if depth > 0.4 and canvas.chance(0.6):
            for _ in range(int(canvas.rng.integers(3, 12))):
                foot_x, foot_y = line[canvas.rng.integers(len(line))]
                tall = canvas.between(0.04, 0.12)
                tree = mix(tone, palette.ink, 0.35)
                canvas.polygon(
                    [(foot_x - tall / 3, foot_y + 0.02), (foot_x, foot_y - tall), (foot_x + tall / 3, foot_y + 0.02)],
                    tree,
                )


def skyline(canvas: Canvas) -> None:
    palette = canvas.palette
    canvas.backdrop(
        mix(palette.ground, palette.ink, canvas.between(0, 0.6)), mix(palette.ground_far, canvas.accent(), 0.6)
    )
    if canvas.chance(0.7):
        canvas.disc(canvas.between(0.1, 0.9), canvas.between(0.1, 0.35), canvas.between(0.05, 0.12), palette.light)
    window = mix(canvas.accent(), palette.light, 0.5)
    for row, (share, top) in enumerate([(0.25, 0.25), (0.7, 0.42)]):
        wall = mix(mix(palette.ground_far, canvas.accent(), 0.5), palette.ink, share)
        x = -0.05
        while x < 1:
            width, roof = canvas.between(0.08, 0.2), top + canvas.between(0, 0.35)
            canvas.box(x, roof, x + width, 1, wall)
            style = canvas.rng.integers(4)
            if style == 0:
                canvas.polygon([(x, roof), (x + width / 2, roof - width * 0.7), (x + width, roof)], wall)
            elif style == 1:
                canvas.line([(x + width / 2, roof), (x + width / 2, roof - 0.12)], wall, 0.012)
            elif style == 2:
                canvas.disc(x + width / 2, roof, width / 2, wall)
            pane = width / canvas.rng.integers(3, 6)
            for pane_y in np.arange(roof + pane, 1, pane * 1.4) if row else []:
                for pane_x in np.arange(x + pane * 0.4, x + width - pane * 0.5, pane):
                    if canvas.chance(0.6):
                        canvas.box(pane_x, pane_y, pane_x + pane * 0.5, pane_y + pane * 0.7, window)
            x += width + canvas.between(-0.01, 0.03)


def still_life(canvas: Canvas) -> None:
    palette = canvas.palette
    canvas.backdrop(palette.ground, palette.ground_far, canvas.rng.random())
    table = canvas.between(0.58, 0.72)
    canvas.box(0, table, 1, 1, mix(canvas.accent(), palette.ink, 0.3))
    for place in np.linspace(0.18, 0.82, int(canvas.rng.integers(2, 5))):
        x, foot = place + canvas.between(-0.06, 0.06), table + canvas.between(0.06, 0.2)
        colour, size = canvas.accent(), canvas.between(0.1, 0.17)
        canvas.oval(x + 0.04, foot, size * 1.1, size * 0.22, mix(palette.ink, canvas.accent(), 0.2))
        kind = canvas.rng.integers(4)
        if kind == 0:
            canvas.ball(x, foot - size * 0.9, size * 0.9, colour)
            canvas.line([(x, foot - size * 1.7), (x + 0.03, foot - size * 2.0)], palette.ink, 0.015)
        elif kind == 1:
            canvas.box(x - size * 0.55, foot - size * 2, x + size * 0.55, foot, colour, size * 0.3)
            canvas.box(x - size * 0.2, foot - size * 3, x + size * 0.2, foot - size * 1.6, colour, size * 0.08)
            canvas.box(
                x - size * 0.4,
                foot - size * 1.7,
                x - size * 0.2,
                foot - size * 0.3,
                mix(colour, palette.light, 0.5),
                size * 0.1,
            )
            canvas.box(x - size * 0.55, foot - size * 1.2, x + size * 0.55, foot - size * 0.7, palette.light)
        elif kind == 2:
            canvas.oval(x, foot - size * 1.3, size * 1.2, size * 0.3, mix(colour, palette.ink, 0.5))
            canvas.draw.pieslice(
                canvas.px([(x - size * 1.2, foot - size * 2.6), (x + size * 1.2, foot)]), 0, 180, fill=colour
            )
        else:
            side = mix(colour, palette.ink, 0.35)
            canvas.polygon(
                [(x, foot - size * 2.2), (x - size, foot), (x + size * 0.2, foot + 0.03)],
                mix(colour, palette.light, 0.25),
            )
            canvas.polygon([(x, foot - size * 2.2), (x + size * 0.2, foot + 0.03), (x + size, foot - 0.03)], side)


def flower(canvas: Canvas) -> None:
    palette = canvas.palette
    canvas.backdrop(palette.ground, palette.ground_far, canvas.rng.random())
    num_flowers = int(canvas.rng.choice([1, 1, 2, 3, 5]))
    stem = mix(canvas.accent(), palette.ink, 0.4)
    for i in range(num_flowers):
        x = (i + 0.5) / num_flowers + canvas.between(-0.06, 0.06)
        y = canvas.between(0.3, 0.5)
        radius = min(0.3, 0.42 / num_flowers**0.6) * canvas.between(0.75, 1.0)
        foot = x + canvas.between(-0.12, 0.12)
        canvas.line([(foot, 1.05), ((x + foot) / 2 + 0.03, 0.75), (x, y)], stem, 0.018)
        for side in (0.02, 0.48):
            canvas.petal(
                (x + foot) / 2 + 0.02, canvas.between(0.75, 0.9), -side - canvas.between(0, 0.1), 0.2, 0.09, stem
            )
        num_petals, width = int(canvas.rng.integers(5, 15)), canvas.between(0.5, 1.1)
        turn, colour = canvas.rng.random(), canvas.accent()
        for layer, reach in enumerate((1.0, canvas.between(0.55, 0.75))):
            tone = mix(colour, palette.light if layer else palette.ink, 0.12 + 0.3 * layer)
            for k in range(num_petals):
                angle = turn + (k + 0.5 * layer) / num_petals
                canvas.petal(x, y, angle, radius * reach, radius * reach * width * 5 / num_petals, tone)
        canvas.disc(x, y, radius * canvas.between(0.16, 0.32), canvas.accent())
        canvas.disc(x, y, radius * 0.1, palette.ink)


def mask(canvas: Canvas) -> None:
    palette = canvas.palette
    canvas.backdrop(palette.ground, palette.ground_far, canvas.rng.random())
    x, y = canvas.between(0.46, 0.54), canvas.between(0.48, 0.56)
    wide, tall = canvas.between(0.24, 0.34), canvas.between(0.3, 0.38)
    skin, hair = mix(canvas.accent(), palette.light, 0.2), mix(canvas.accent(), palette.ink, 0.45)
    num_rays = int(canvas.rng.choice([0, 9, 15, 23]))
    for k in range(num_rays):
        canvas.petal(x, y, k / num_rays, canvas.between(0.42, 0.5), 0.12, hair)
    if canvas.chance(0.5):
        for side in (-1, 1):
            tip = (x + side * wide * 1.1, y - tall * 1.3)
            canvas.polygon([(x + side * wide * 0.2, y - tall * 0.7), tip, (x + side * wide, y - tall * 0.2)], hair)
    canvas.oval(x, y, wide, tall, skin)
    canvas.draw.pieslice(
        canvas.px([(x - wide, y - tall), (x + wide, y + tall)]), -90, 90, fill=mix(skin, palette.ink, 0.16)
    )
    eye_x, eye_y, eye = (
        wide * canvas.between(0.38, 0.5),
        y - tall * canvas.between(0.1, 0.3),
        canvas.between(0.04, 0.075),
    )
    flat, brow = canvas.between(0.5, 1.0), canvas.between(-0.04, 0.04)
    mark = canvas.accent()
    for side in (-1, 1):
        canvas.oval(x + side * eye_x, eye_y, eye * 1.2, eye * flat, palette.light)
        canvas.disc(x + side * eye_x, eye_y, eye * 0.5, palette.ink)
        inner, outer = (x + side * eye_x * 0.4, eye_y - 0.08 + brow), (x + side * eye_x * 1.6, eye_y - 0.08 - brow)
        canvas.line([inner, outer], hair, 0.02)
        canvas.disc(x + side * wide * 0.55, y + tall * 0.25, canvas.between(0.03, 0.06), mark)
    canvas.polygon(
        [(x, eye_y), (x + canvas.between(0.03, 0.07), y + tall * 0.25), (x - 0.02, y + tall * 0.25)],
        mix(skin, palette.ink, 0.4),
    )
    mouth, smile = wide * canvas.between(0.25, 0.55), canvas.between(-0.05, 0.09)
    lip_y = y + tall * 0.52
    canvas.line(
        [(x - mouth, lip_y), (x, lip_y + smile), (x + mouth, lip_y)],
        mix(mark, palette.ink, 0.4),
        canvas.between(0.015, 0.045),
    )
    for k in range(int(canvas.rng.integers(0, 5))):
        canvas.disc(x, y - tall * (0.9 - 0.13 * k), 0.02, mark)


def fish(canvas: Canvas) -> None:
    palette = canvas.palette
    canvas.backdrop(mix(palette.ground, canvas.accent(), 0.25), mix(palette.ground_far, palette.ink, 0.4))
    for _ in range(int(canvas.rng.integers(2, 6))):
        weed_x, weed = canvas.rng.random(), mix(canvas.accent(), palette.ink, 0.4)
        sway = canvas.between(0.01, 0.04)
        canvas.line(
            [(weed_x + sway * math.sin(9 * s), 1 - s) for s in np.linspace(0, canvas.between(0.2, 0.6), 12)],
            weed,
            0.025,
        )
    num_fish = int(canvas.rng.choice([1, 1, 2, 3, 4]))
    for i in range(num_fish):
        x, y = (
            canvas.between(0.35, 0.65) if num_fish == 1 else canvas.between(0.2, 0.8),
            (i + 0.5) / num_fish + canvas.between(-0.05, 0.05),
        )
        length, plump = canvas.between(0.2, 0.3) / num_fish**0.4, canvas.between(0.4, 0.8)
        face = 1 if canvas.chance(0.5) else -1
        body, fin = canvas.accent(), canvas.accent()
        canvas.polygon([(x - face * length * 0.7, y), (x - face * length * 1.5, y - length * 0.6),
                        (x - face * length * 1.25, y), (x - face * length * 1.5, y + length * 0.6)], fin)  # fmt: skip
        canvas.polygon([(x + face * length * 0.3, y - length * plump * 0.7), (x - face * length * 0.2, y - length * (plump + 0.45)),
                        (x - face * length * 0.6, y - length * plump * 0.4)], fin)  # fmt: skip
        canvas.oval(x, y, length, length * plump, body)
        canvas.oval(
            x + face * length * 0.08,
            y + length * plump * 0.3,
            length * 0.75,
            length * plump * 0.6,
            mix(body, palette.light, 0.4),
        )
        stripe = mix(fin, palette.ink, 0.25)
        for place in np.linspace(-0.5, 0.35, int(canvas.rng.integers(0, 5))):
            half = plump * math.sqrt(1 - place**2) * length * 0.9
            canvas.line(
                [(x + face * place * length, y - half), (x + face * place * length, y + half)], stripe, length * 0.12
            )
        canvas.disc(x + face * length * 0.65, y - length * plump * 0.2, length * 0.14, palette.light)
        canvas.disc(x + face * length * 0.68, y - length * plump * 0.2, length * 0.07, palette.ink)
    for _ in range(int(canvas.rng.integers(3, 10))):
        canvas.disc(
            canvas.rng.random(),
            canvas.rng.random(),
            canvas.between(0.008, 0.03),
            mix(palette.ground, palette.light, 0.6),
        )


def planet(canvas: Canvas) -> None:
    palette = canvas.palette
    night = mix(palette.ink, canvas.accent(), 0.12)
    canvas.backdrop(night, mix(night, canvas.accent(), 0.35), canvas.rng.random())
    for _ in range(int(canvas.rng.integers(20, 70))):
        canvas.disc(canvas.rng.random(), canvas.rng.random(), canvas.between(0.003, 0.011), palette.light)
    x, y, radius = canvas.between(0.35, 0.65), canvas.between(0.4, 0.62), canvas.between(0.17, 0.32)
    ringed, tilt = canvas.chance(0.6), canvas.between(-0.35, 0.35)
    ring = [(x + 1.75 * radius * math.cos(a), y + 0.45 * radius * math.sin(a) + tilt * radius * math.cos(a))
            for a in np.linspace(0, TAU, 50)]  # fmt: skip
    ring_tone, body = mix(canvas.accent(), palette.light, 0.3), canvas.accent()
    if ringed:
        canvas.line(ring[24:], mix(ring_tone, night, 0.4), radius * 0.17)
    canvas.disc(x, y, radius, body)
    for place in np.linspace(-0.75, 0.75, int(canvas.rng.integers(0, 7))):
        half = radius * math.sqrt(1 - place**2)
        canvas.line(
            [(x - half * 0.93, y + place * radius), (x + half * 0.93, y + (place + tilt * 0.2) * radius)],
            canvas.accent(),
            radius * 0.13,
        )
    for _ in range(int(canvas.rng.integers(0, 7))):
        angle, off = TAU * canvas.rng.random(), radius * 0.7 * canvas.rng.random()
        canvas.disc(
            x + off * math.cos(angle),
            y + off * math.sin(angle),
            radius * canvas.between(0.08, 0.2),
            mix(body, palette.ink, 0.35),
        )
    shadow = canvas.rng.choice([-1, 1])
    edge = [(x + radius * math.cos(a), y + radius * math.sin(a)) for a in np.linspace(-TAU / 4, TAU / 4, 20)]
    inner = [(x + 0.45 * radius * math.cos(a), y + radius * math.sin(a)) for a in np.linspace(TAU / 4, -TAU / 4, 20)]
    canvas.polygon([(x + shadow * (px - x), py) for px, py in edge + inner], mix(night, body, 0.3))
    if ringed:
        canvas.line(ring[:26], ring_tone, radius * 0.17)
    for _ in range(int(canvas.rng.integers(0, 3))):
        canvas.ball(
            canvas.between(0.08, 0.92), canvas.between(0.08, 0.25), canvas.between(0.025, 0.07), canvas.accent()
        )


def butterfly(canvas: Canvas) -> None:
    palette = canvas.palette
    canvas.backdrop(palette.ground, palette.ground_far, canvas.rng.random())
    x, y, span = canvas.between(0.46, 0.54), canvas.between(0.45, 0.55), canvas.between(0.36, 0.46)
    wing, edge, spot = canvas.accent(), mix(canvas.accent(), palette.ink, 0.5), mix(canvas.accent(), palette.light, 0.3)
    upper, lower = canvas.between(0.06, 0.14), canvas.between(0.08, 0.16)
    plump, reach = canvas.between(0.6, 1.0), canvas.between(0.6, 0.85)
    for side in (-1, 1):
        for lift, length in ((-upper, span), (lower, span * reach)):
            angle = lift if side > 0 else 0.5 - lift
            for share, tone in ((1.0, edge), (0.84, wing), (0.5, mix(wing, spot, 0.6))):
                canvas.petal(x, y, angle, length * share, length * plump * share * 0.9, tone)
            for along in (0.6, 0.78):
                dot_x, dot_y = x + length * along * math.cos(TAU * angle), y + length * along * math.sin(TAU * angle)
                canvas.disc(dot_x, dot_y, span * 0.06, spot)
    canvas.line([(x, y - span * 0.3), (x, y + span * 0.45)], palette.ink, span * 0.09)
    for side in (-1, 1):
        canvas.line([(x, y - span * 0.3), (x + side * span * 0.25, y - span * 0.75)], palette.ink, 0.012)


def boats(canvas: Canvas) -> None:
    palette = canvas.palette
    canvas.backdrop(palette.ground, mix(palette.ground_far, palette.light, 0.3))
    sea = mix(canvas.accent(), palette.ground_far, 0.3)
    horizon = canvas.between(0.45, 0.62)
    if canvas.chance(0.6):
        canvas.disc(
            canvas.between(0.1, 0.9),
            canvas.between(0.12, 0.45),
            canvas.between(0.06, 0.13),
            mix(canvas.accent(), palette.light, 0.3),
        )
    canvas.box(0, horizon, 1, 1, sea)
    num_boats = int(canvas.rng.integers(1, 4))
    for i in range(num_boats):
        x, size = (i + 0.5) / num_boats + canvas.between(-0.1, 0.1), canvas.between(0.2, 0.34) / num_boats**0.5
        foot, lean = horizon + canvas.between(0.08, 0.25), canvas.between(-0.15, 0.15)
        sail = mix(canvas.accent(), palette.light, canvas.between(0, 0.6))
        canvas.polygon(
            [(x + 0.01, foot - 0.05), (x + lean * size, foot - size * 1.6), (x + size * 0.8, foot - 0.06)], sail
        )
        canvas.polygon(
            [(x - 0.01, foot - 0.05), (x + lean * size, foot - size * 1.3), (x - size * 0.6, foot - 0.06)],
            mix(sail, palette.ink, 0.2),
        )
        hull = mix(canvas.accent(), palette.ink, 0.35)
        canvas.polygon(
            [
                (x - size * 0.8, foot - 0.04),
                (x + size, foot - 0.05),
                (x + size * 0.65, foot + size * 0.25),
                (x - size * 0.5, foot + size * 0.25),
            ],
            hull,
        )
    for _ in range(int(canvas.rng.integers(8, 20))):
        wave_x, wave_y, half = canvas.rng.random(), canvas.between(horizon + 0.05, 1), canvas.between(0.04, 0.14)
        canvas.line(
            [(wave_x - half, wave_y), (wave_x, wave_y - 0.015), (wave_x + half, wave_y)],
            mix(sea, palette.light, 0.45),
            0.012,
        )


THINGS = {
    "hills": hills,
    "skylines": skyline,
    "still-lifes": still_life,
    "flowers": flower,
    "masks": mask,
    "fish": fish,
    "planets": planet,
    "butterflies": butterfly,
    "boats": boats,
}
