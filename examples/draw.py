"""Draws the pictures beside this script, which the page offers to click on: `python examples/draw.py`.

Each is named for its class. They are drawn 4 times too large and reduced, in units of a hundredth of the side, y downwards."""
from math import cos, pi, sin, tau
from pathlib import Path
from random import Random

from PIL import Image, ImageChops, ImageColor, ImageDraw, ImageFont

SZ, SCALE = 192, 4
SIDE = SZ * SCALE
UNIT = SIDE / 100


# ---- tools ----

def ramp(stops, t):
    "The colour at `t`, 0 to 1, on the way along the colours `stops`."
    rgb, t = [ImageColor.getrgb(o) for o in stops], min(max(t, 0), 1) * (len(stops) - 1)
    i = min(int(t), len(rgb) - 2)
    return tuple(round(a + (b - a) * (t - i)) for a, b in zip(rgb[i], rgb[i + 1]))

def across(*stops, start=0, end=100):
    "A gradient from left to right."
    im = Image.new("RGB", (SIDE, 1))
    for x in range(SIDE): im.putpixel((x, 0), ramp(stops, (x / UNIT - start) / (end - start)))
    return im.resize((SIDE, SIDE))

def down(*stops, start=0, end=100):
    "A gradient from top to bottom."
    return across(*stops, start=start, end=end).transpose(Image.Transpose.ROTATE_270)

def ball(*stops, at, r):
    "A gradient from the point `at` outwards to the distance `r`."
    im = Image.new("RGB", (SIDE, SIDE), stops[-1])
    d, (x, y), n = ImageDraw.Draw(im), at, 160
    for i in range(n, 0, -1):
        s = r * i / n
        d.ellipse([UNIT * o for o in (x - s, y - s, x + s, y + s)], ramp(stops, i / n))
    return im

def arc(x, y, rx, ry, start=0, end=360, turn=0, n=72):
    "Points on an ellipse round x,y from the angle `start` to `end`, clockwise from the right; `turn` tilts it all."
    angles = [(start + (end - start) * i / n) * pi / 180 for i in range(n + 1)]
    return spin([(rx * cos(a), ry * sin(a)) for a in angles], x, y, turn * pi / 180)

def smooth(pts, closed=True, n=10):
    "Points on a smooth curve through `pts` (Catmull-Rom)."
    pts = [pts[-1], *pts, *pts[:2]] if closed else [pts[0], *pts, pts[-1]]
    res = []
    for a, b, c, d in zip(pts, pts[1:], pts[2:], pts[3:]):
        for t in (i / n for i in range(n)):
            res.append(tuple(((2 * q) + (r - p) * t + (2 * p - 5 * q + 4 * r - s) * t**2 + (3 * q - p - 3 * r + s) * t**3) / 2
                             for p, q, r, s in zip(a, b, c, d)))
    return res if closed else [*res, pts[-2]]

def spin(pts, x, y, a):
    "`pts` turned by `a` radians, clockwise, and moved to x,y."
    return [(x + u * cos(a) - v * sin(a), y + u * sin(a) + v * cos(a)) for u, v in pts]

def box(x0, y0, x1, y1):
    "A rectangle's corners."
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


class Picture:
    """A picture begun with a background, then painted over with shapes in a colour or a gradient.

    Every shape can be blurred (`soft`, in units), let through what is below it (`alpha`) and be kept within an earlier one (`clip`)."""
    def __init__(self, ground, tilt=0): self.im, self.tilt = ground, tilt

    def place(self, pts):
        "`pts` in pixels, tilted by `tilt` degrees round the middle of the picture."
        return [(UNIT * x, UNIT * y) for x, y in spin([(x - 50, y - 50) for x, y in pts], 50, 50, self.tilt * pi / 180)]

    def paint(self, fill, mask, soft=0, alpha=1, clip=None):
        "Lay `fill` on where `mask` is white. Returns the mask."
        x0, y0, x1, y1 = mask.getbbox() or (0, 0, 1, 1)
        n = max(2, round(soft * UNIT)) if soft else 1
        where = max(0, (x0 // n - 3) * n), max(0, (y0 // n - 3) * n), min(SIDE, (x1 // n + 4) * n), min(SIDE, (y1 // n + 4) * n)
        part = mask.crop(where)
        if soft: part = part.reduce(n).resize(part.size, Image.Resampling.BICUBIC)
        if clip: part = ImageChops.multiply(part, clip.crop(where))
        mask.paste(part, where)
        self.im.paste(fill.crop(where) if isinstance(fill, Image.Image) else fill, where, part.point([round(o * alpha) for o in range(256)]))
        return mask

    def shape(self, fill, pts, **kw):
        "The polygon of `pts`."
        mask = Image.new("L", (SIDE, SIDE))
        ImageDraw.Draw(mask).polygon(self.place(pts), 255)
        return self.paint(fill, mask, **kw)

    def line(self, fill, pts, width=1, **kw):
        "A line through `pts` with round ends."
        mask, pts, w = Image.new("L", (SIDE, SIDE)), self.place(pts), width * UNIT
        d = ImageDraw.Draw(mask)
        d.line(pts, 255, round(w), "curve")
        for x, y in (pts[0], pts[-1]): d.ellipse((x - w / 2, y - w / 2, x + w / 2, y + w / 2), 255)
        return self.paint(fill, mask, **kw)

    def oval(self, fill, x, y, rx, ry=None, turn=0, **kw): return self.shape(fill, arc(x, y, rx, ry or rx, turn=turn), **kw)
    def blob(self, fill, pts, **kw): return self.shape(fill, smooth(pts), **kw)


# ---- CIFAR-100 ----

def apple():
    "A red apple with a leaf, on a light table."
    p = Picture(down("#f6f3ec", "#efe9dd", "#d8cdb9", "#cbbda5"))
    p.oval("#5b4a38", 55, 91, 42, 8, soft=5, alpha=.75)
    body = p.blob(ball("#f4583c", "#d81f22", "#b50f1a", "#7c0914", "#4c0610", at=(36, 44), r=68),
                  [(50, 24), (60, 18), (75, 18), (87, 27), (92, 44), (90, 64), (80, 83), (64, 93), (50, 91),
                   (36, 93), (20, 83), (10, 64), (8, 44), (13, 27), (25, 18), (40, 18)])
    rnd = Random(1)
    for _ in range(70):                                              # streaks from the dimple down the sides
        a, y = rnd.uniform(-1, 1), rnd.uniform(50, 86)
        p.line(rnd.choice(["#f9a23c", "#f26a38", "#8d0a14"]),
               smooth([(50 + a * 9, 25), (50 + a * 30, 32), (50 + a * 43, (34 + y) / 2), (50 + a * 41, y)], False), .7,
               soft=.6, alpha=.22, clip=body)
    p.oval("#e8a83a", 50, 27, 17, 6, soft=3, alpha=.55, clip=body)
    p.oval("#3c0a0c", 51, 25, 9, 4, soft=2, alpha=.9, clip=body)
    p.oval("#ff9a70", 80, 78, 6, 12, turn=35, soft=4, alpha=.35, clip=body)
    p.oval("#ffd9cc", 30, 42, 9, 14, turn=25, soft=4, alpha=.6, clip=body)
    p.oval("#ffffff", 29, 37, 4, 7, turn=25, soft=1.5, alpha=.9, clip=body)
    p.line("#4a2d16", smooth([(50, 27), (50, 18), (54, 8), (58, 4)], False), 3.4)
    p.line("#8a6136", smooth([(49.4, 25), (49.4, 17), (53, 8)], False), 1)
    leaf = p.blob(down("#9ad04c", "#4d9a2a", "#2b6a1d", start=2, end=22), [(53, 14), (62, 6), (76, 2), (90, 7), (82, 16), (68, 19)])
    p.line("#cbe88f", smooth([(54, 14), (68, 10), (88, 7)], False), .8, alpha=.8, clip=leaf)
    return p

def orange():
    "An orange, and half of one before it."
    p = Picture(down("#dfe8e2", "#c9d6cd", "#b8a585", "#a68a63"))
    rnd, x, y, r = Random(2), 42, 42, 38
    p.oval("#4a3620", 52, 84, 46, 10, soft=5, alpha=.65)
    body = p.oval(ball("#ffc14a", "#ff9d1c", "#f58208", "#d66503", "#8f3d02", at=(32, 28), r=62), x, y, r)
    for _ in range(420):                                             # pores of the peel
        a, s = rnd.uniform(0, tau), r * rnd.random()**.5
        u, v = x + s * cos(a), y + s * sin(a)
        p.oval("#b65203", u, v, .8, alpha=.22, clip=body)
        p.oval("#ffd58a", u - .6, v - .6, .5, alpha=.2, clip=body)
    p.oval("#fff2d0", 29, 24, 9, 7, turn=-35, soft=3, alpha=.75, clip=body)
    p.blob(down("#8ccc4a", "#2f7a22", start=2, end=20), [(44, 9), (52, 3), (66, 3), (78, 10), (64, 15), (52, 14)])
    p.line("#d2efa0", smooth([(45, 9), (60, 8), (76, 10)], False), .7, alpha=.8)
    p.oval("#4d6b24", 43, 9, 3.4, 2.2)
    x, y, r = 66, 67, 29
    p.oval("#4a2202", 61, 71, 31, soft=4, alpha=.5)
    p.oval(ball("#ffab2e", "#f48509", "#c65b02", at=(58, 58), r=46), x, y, r)
    p.oval("#ffeecb", x, y, r - 2.4)
    for i in range(10):                                              # the segments
        a = 36 * i + 8
        c, s = cos((a + 15.5) * pi / 180), sin((a + 15.5) * pi / 180)
        m = p.shape(ball("#ffc95c", "#ffa523", "#f68a0c", at=(x, y), r=26), smooth([(x + 2.6 * c, y + 2.6 * s), *arc(x, y, 24.5, 24.5, a, a + 31, n=4)], n=6))
        for _ in range(9):
            b, q = (a + rnd.uniform(3, 28)) * pi / 180, rnd.uniform(8, 19)
            p.line(rnd.choice(["#ffe29a", "#ee7a05"]), [(x + q * cos(b), y + q * sin(b)), (x + (q + 4) * cos(b), y + (q + 4) * sin(b))], .7, alpha=.6, clip=m)
    p.oval("#fff3d8", x, y, 2.6)
    return p

def sunflower():
    "A sunflower before the sky."
    p = Picture(down("#3f8fdc", "#79b7ec", "#b9dcf2", "#86b04e", "#4a7a2a"))
    rnd, x, y = Random(3), 50, 45
    for _ in range(60):
        c = rnd.choice(["#3f7426", "#6fa23a", "#e2b92c", "#2f5d1f"])
        p.oval(c, rnd.uniform(0, 100), rnd.uniform(80, 102), rnd.uniform(4, 8), soft=3, alpha=.5)
    p.line(across("#79a83c", "#3d6b20", start=46, end=56), smooth([(50, 60), (51, 80), (49, 104)], False), 5.5)
    for pts, stops in (([(50, 92), (32, 78), (10, 80), (4, 88), (22, 97)], ("#86bb45", "#3c7424")),
                       ([(50, 96), (66, 80), (88, 78), (97, 86), (78, 98)], ("#6ba238", "#2c5c1c"))):
        p.blob(down(*stops, start=78, end=98), pts)
        p.line("#a9d36c", smooth([pts[0], (sum(o[0] for o in pts) / 5, 87), pts[2]], False), .7, alpha=.7)
    for r, n, off, stops in ((45, 20, 0, ("#8a4a04", "#d98a08", "#f4b512", "#f9c92a")), (41, 18, .5, ("#a85c04", "#f0a50a", "#ffd022", "#ffe45c"))):
        glow = ball(*stops, at=(x, y), r=r)
        for i in range(n):
            a, q, w, bend = tau * (i + off) / n + rnd.uniform(-.06, .06), r * rnd.uniform(.92, 1.06), rnd.uniform(5, 6.4), rnd.uniform(-2, 2)
            p.blob("#7a4a06", spin([(14, -3), (q * .6, -w - .5), (q, bend), (q * .6, w + .5), (14, 3)], x, y, a), alpha=.5)
            m = p.blob(glow, spin([(14, -3), (q * .6, -w), (q, bend), (q * .6, w), (14, 3)], x, y, a))
            p.line("#b87406", spin([(18, 0), (q - 4, 0)], x, y, a), .6, alpha=.55, clip=m)
    p.oval("#4a2604", x, y, 21, soft=2, alpha=.8)
    p.oval(ball("#3a2410", "#241408", "#4b2b0c", "#8a5312", "#5e360a", at=(x, y), r=19), x, y, 19)
    for i in range(220):                                             # seeds on a spiral of the golden angle
        a, s = i * 2.39996, 18.4 * (i / 220)**.5
        u, v = x + s * cos(a), y + s * sin(a)
        p.oval(ramp(["#6b5a22", "#2a170a", "#94601a", "#d89a2c"], s / 18.4), u, v, .55 + .25 * s / 18)
    p.oval("#000000", 54, 50, 15, 14, soft=4, alpha=.25)
    return p

def clock():
    "A wall clock with a white face."
    p = Picture(ball("#d7e2e8", "#b9cad4", "#8ea3b0", at=(30, 25), r=110))
    x, y = 50, 50
    p.oval("#2a3740", 55, 57, 45, soft=6, alpha=.7)
    p.oval(down("#5b6066", "#26292d", "#0c0d0f"), x, y, 46)
    p.oval(down("#0c0d0f", "#34383d", "#7a8088"), x, y, 42.5)
    p.oval(ball("#ffffff", "#fafbfb", "#e6eaec", "#c3cace", at=(42, 40), r=58), x, y, 40)
    for i in range(60):
        c, s = cos(tau * i / 60), sin(tau * i / 60)
        p.line("#1b1b1e", [(x + q * c, y + q * s) for q in ((33.5, 37.5) if i % 5 == 0 else (36, 37.5))], 1.5 if i % 5 == 0 else .5)
    font = ImageFont.load_default(11 * UNIT)
    for i in range(1, 13):
        a, mask = tau * i / 12 - pi / 2, Image.new("L", (SIDE, SIDE))
        ImageDraw.Draw(mask).text((UNIT * (x + 27 * cos(a)), UNIT * (y + 27 * sin(a))), str(i), 255, font, anchor="mm", stroke_width=2)
        p.paint("#17171a", mask)
    for turn, back, reach, w in ((304, 5, 19, 4.2), (54, 6, 31, 3.2)):   # ten past ten
        a = (turn - 90) * pi / 180
        pts = [(x - back * cos(a), y - back * sin(a)), (x + reach * cos(a), y + reach * sin(a))]
        p.line("#7d868c", [(u + 1.2, v + 1.6) for u, v in pts], w, soft=1, alpha=.6)
        p.line("#101014", pts, w)
    p.line("#c0201c", [(x - 4, y - 7), (x + 15, y + 27)], .9)
    p.oval("#c0201c", x, y, 2.4)
    p.shape("#ffffff", [(14, 34), (40, 12), (58, 11), (18, 60)], soft=2, alpha=.28, clip=p.oval("#ffffff", x, y, 39.5, alpha=0))
    return p

def ridge(rnd, pts, rough, n=5):
    "A jagged line: the middle of every stretch of `pts` is moved, `n` times over."
    for _ in range(n):
        mid = [((a[0] + b[0]) / 2 + rnd.uniform(-.3, .3) * rough, (a[1] + b[1]) / 2 + rnd.uniform(-1, 1) * rough) for a, b in zip(pts, pts[1:])]
        pts, rough = [o for pair in zip(pts, mid) for o in pair] + [pts[-1]], rough / 2
    return pts

def mountain():
    "A snowy peak above a forest."
    rnd, p = Random(5), Picture(down("#2f74c4", "#6aa6df", "#b4d4ee", "#e4eef4", end=70))
    for x, y, w in ((16, 20, 20), (86, 26, 22), (4, 34, 18)):
        for _ in range(12): p.oval("#ffffff", x + rnd.uniform(-w, w) / 2, y + rnd.uniform(-2, 2), rnd.uniform(4, 8), rnd.uniform(1.5, 3), soft=2, alpha=.4)
    p.shape(down("#a9bfd8", "#8ca8c4", start=35, end=70), ridge(rnd, [(-2, 52), (14, 38), (26, 50), (70, 52), (84, 36), (102, 50)], 4) + [(102, 80), (-2, 80)])
    top, spine = (49, 9), ridge(rnd, [(49, 9), (54, 24), (47, 40), (56, 58), (52, 78)], 3)
    left, right = ridge(rnd, [(-4, 64), (12, 47), (22, 42), (36, 23), top], 4), ridge(rnd, [top, (60, 22), (70, 34), (80, 40), (104, 66)], 4)
    lit = p.shape(down("#ffffff", "#f2f5f9", "#cfd6de", "#8f8c88", "#6b655c", start=8, end=78), left + spine + [(-4, 80)])
    dark = p.shape(down("#b9cbe4", "#8ba3c6", "#66799a", "#4d5563", "#424640", start=8, end=78), right + [(104, 80)] + spine[::-1])
    for _ in range(230):                                             # gullies: rock showing through the snow, snow between the rocks
        y = rnd.uniform(14, 74)
        for m, sign, rock, snow in ((lit, -1, ("#6f6a66", "#8b8580", "#57524e"), "#ffffff"), (dark, 1, ("#3c4456", "#4a556c", "#2f3644"), "#c9d8ee")):
            x, n, w = 50 + sign * rnd.uniform(-4, (y - 8) * .85), rnd.uniform(3, 9), rnd.uniform(.5, 1.6)
            bare = rnd.random() < (y - 5) / 62
            p.shape(rnd.choice(rock) if bare else snow, [(x, y), (x + w, y + n * .4), (x + sign * n * .55, y + n), (x - w, y + n * .5)], alpha=.7, clip=m)
    p.shape(down("#5c7a4a", "#33542c", start=62, end=84), ridge(rnd, [(-2, 66), (22, 70), (50, 73), (78, 69), (102, 64)], 3) + [(102, 102), (-2, 102)])
    for i in range(150):                                             # firs, the nearer the larger and darker
        t = i / 150
        x, y, h = rnd.uniform(-3, 103), 74 + 18 * t + rnd.uniform(-2, 2), 5 + 9 * t
        p.shape(ramp(["#4a6b44", "#2c4a2a", "#16301a"], t), [(x, y - h), (x + h * .22, y), (x - h * .22, y)])
    p.shape(down("#7f9a45", "#577a2c", start=90, end=100), ridge(rnd, [(-2, 92), (40, 95), (102, 91)], 2) + [(102, 102), (-2, 102)])
    return p

def rocket():
    "A rocket that lifts off."
    rnd, p = Random(6), Picture(down("#2a6cbd", "#5a9ad8", "#a5cbe8", "#dfe6e6"))
    for x in (9, 17): p.line("#5d646d", [(x, 30), (x, 100)], 1.4)    # the tower
    for y in range(30, 96, 7): p.line("#6d747d", [(9, y), (17, y + 7), (9, y + 7)], .8); p.line("#6d747d", [(17, y), (9, y + 7)], .8)
    for y in (38, 58): p.line("#5d646d", [(17, y), (31, y)], 1.4)
    for _ in range(90):                                              # smoke
        t = rnd.random()
        x, y, r = 50 + rnd.uniform(-1, 1) * (12 + 44 * t), 84 + 14 * t + rnd.uniform(-3, 5), rnd.uniform(5, 11)
        p.oval(ramp(["#8f8a86", "#cfcac4", "#f4f1ec"], rnd.random()), x, y, r, soft=1.6, alpha=.75)
        p.oval("#ffffff", x - r * .3, y - r * .4, r * .55, soft=1.5, alpha=.6)
    for x, w in ((50, 9), (35.5, 6), (64.5, 6)):                     # flames
        for c, k, n in (("#ff7a18", 1.25, 1.1), ("#ffb52e", 1, 1), ("#ffe98a", .7, .85), ("#ffffff", .42, .6)):
            p.blob(c, [(x - w * .45 * k, 72), (x + w * .45 * k, 72), (x + w * .62 * k, 80), (x, 72 + 26 * n), (x - w * .62 * k, 80)], soft=1.2, alpha=.9)
    p.oval("#ffd27a", 50, 90, 34, 12, soft=6, alpha=.55)
    for x in (35.5, 64.5):                                           # boosters
        shade = across("#8e959d", "#f4f5f6", "#ffffff", "#b4bac2", "#6c737c", start=x - 5, end=x + 5)
        p.shape("#33373d", [(x - 3, 70), (x + 3, 70), (x + 4.6, 75), (x - 4.6, 75)])
        p.shape(shade, [(x - 4.6, 36), *smooth([(x - 4.6, 36), (x - 3, 29), (x, 25), (x + 3, 29), (x + 4.6, 36)], False), (x + 4.6, 71), (x - 4.6, 71)])
        for y in (42, 64): p.shape("#2b3038", box(x - 4.6, y, x + 4.6, y + 1.6), alpha=.8)
    p.shape("#2c3036", [(45, 71), (55, 71), (57.5, 77), (42.5, 77)])
    shade = across("#8f969f", "#f2f3f5", "#ffffff", "#e4e7ea", "#a3aab3", "#636a74", start=40, end=60)
    body = p.shape(shade, [(40.5, 26), *smooth([(40.5, 26), (42.5, 15), (47, 6), (50, 2.5), (53, 6), (57.5, 15), (59.5, 26)], False), (59.5, 72), (40.5, 72)])
    for y0, y1, c in ((25, 27, "#2a2e36"), (44, 46, "#2a2e36"), (66, 72, "#2a2e36"), (14, 17, "#c4242c")): p.shape(c, box(38, y0, 62, y1), alpha=.85, clip=body)
    p.shape("#c4242c", box(45, 30, 50, 40), clip=body); p.shape("#24469c", box(50, 30, 55, 40), clip=body)
    for y in (46, 52, 58): p.shape("#24262c", box(48, y, 51.5, y + 4), alpha=.8)
    p.oval("#ffb84a", 50, 74, 12, 5, soft=3, alpha=.45)
    return p

def cloud():
    "White clouds in a blue sky."
    rnd, p = Random(7), Picture(down("#1f63b8", "#3d84d0", "#74abe2", "#add0ee"))
    for _ in range(40): p.oval("#ffffff", rnd.uniform(-5, 105), rnd.uniform(4, 20), rnd.uniform(6, 16), rnd.uniform(.8, 2), turn=-8, soft=2, alpha=.12)
    for x, y, w, h in ((84, 88, 40, 16), (14, 90, 36, 14), (50, 54, 44, 32)):
        puffs = []
        for _ in range(int(w * 3.4)):
            u = rnd.uniform(-1, 1)
            v = y + h * .45 - rnd.random() * h * (1 - u * u)**.7 * (1.1 + .25 * sin(5 * u + 1))
            puffs.append((x + u * w, v, rnd.uniform(.16, .34) * h * (1.15 - .6 * abs(u))))
        for u, v, r in puffs: p.oval("#dfe9f4", u, v, r * 1.15, soft=1.6, alpha=.8)
        for u, v, r in sorted(puffs, key=lambda o: -o[1]) if h < 20 else sorted(puffs, key=lambda o: o[1]):
            t = (v - y + h * .7) / (h * 1.15)                         # 0 at the top, 1 at the foot
            p.oval(ramp(["#f4f8fc", "#e6edf5", "#c3cfdd", "#98a8bd"], t), u, v, r, soft=1.2, alpha=.75)
            p.oval(ramp(["#ffffff", "#ffffff", "#f0f4f8", "#b4c2d2"], t), u - r * .25, v - r * .35, r * .68, soft=1.4, alpha=.85)
        p.oval("#8899b2", x, y + h * .5, w * .8, h * .12, soft=4, alpha=.45)
    return p

def bottle():
    "A green wine bottle."
    p = Picture(down("#f3f1ec", "#e6e2da", "#d6d0c5", "#b5ab9b", "#a89d8b"))
    p.oval("#3c3428", 62, 94, 34, 5, soft=4, alpha=.6)
    half = [(5.2, 3), (5.2, 24), (6, 30), (10, 37), (14.6, 42), (17, 47.5), (17.6, 53), (17.6, 60), (17.6, 86), (17.4, 92), (16, 95.6), (12, 97)]
    line = smooth([(50 + u, v) for u, v in half], False)
    glass = p.shape(across("#06180a", "#1c4a20", "#3f8a3c", "#1f5a24", "#123a17", "#2b6a2c", "#081c0b", start=32, end=68),
                    line + [(100 - u, v) for u, v in line[::-1]])
    p.shape("#000000", box(30, 90, 70, 99), soft=3, alpha=.35, clip=glass)
    p.line("#b9e8a8", smooth([(45.8, 26), (45, 32), (40, 40), (36.5, 48), (36, 56), (36, 92)], False), 1.8, soft=.8, alpha=.8, clip=glass)
    p.line("#8ed080", smooth([(55, 27), (57, 34), (63, 43), (64.6, 52), (64.6, 90)], False), 1, soft=.8, alpha=.55, clip=glass)
    foil = across("#4a0710", "#a81a2a", "#e0606a", "#9a1422", "#5c0a14", "#38050c", start=44, end=56)
    p.shape(foil, box(44.8, 3, 55.2, 22)); p.shape(foil, box(44, 2, 56, 6.4))
    for y in (6.6, 21): p.line("#2e040a", [(44.8, y), (55.2, y)], .6, alpha=.7)
    paper = across("#a79a7e", "#efe6cf", "#fbf6e8", "#f0e7d2", "#c9bd9f", "#8c8066", start=32, end=68)
    label = p.shape(paper, arc(50, 55, 17.6, 1.6, 180, 0) + arc(50, 84, 17.6, 1.6, 0, 180), clip=glass)
    for y, w, c, n in ((60, 13, "#8c1a24", 1.4), (76, 11, "#4a4236", .8), (79, 8, "#4a4236", .8), (82, 12, "#8c1a24", 1)):
        p.line(c, [(50 - w, y + 1), (50, y + 1.6), (50 + w, y + 1)], n, clip=label)
    p.blob("#4f7a2c", [(44, 65), (50, 63.5), (56, 65), (54, 68), (46, 68)], clip=label)
    for i, n in enumerate((3, 2, 1)):                                # grapes
        for k in range(n): p.oval("#5a1c4a", 50 + (k - (n - 1) / 2) * 3.2, 68 + i * 2.5, 1.6, clip=label)
    return p


# ---- CIFAR-10 ----

def airplane():
    "An airliner in the sky."
    rnd, p = Random(9), Picture(down("#2a6bbd", "#4a8bd2", "#7ab0e2", "#b8d6ee"), tilt=-9)
    for x, y, w in ((14, 82, 26), (60, 99, 30)):
        for _ in range(22): p.oval("#ffffff", x + rnd.uniform(-w, w) * .6, y + rnd.uniform(-4, 4), rnd.uniform(5, 10), rnd.uniform(2, 4), soft=2.5, alpha=.4)
    p.shape(down("#aab4c0", "#7d8894", start=28, end=46), [(56, 46), (72, 28), (78, 27), (69, 46)])                  # far wing
    p.shape(down("#8f9aa6", "#6c7884", start=36, end=46), [(85, 45), (94, 37), (98, 37), (93, 46)])
    hull = smooth([(3, 53), (6, 49), (13, 45.5), (24, 43.6), (60, 43.6), (82, 44),
                   (97, 46.5), (98, 48), (88, 51), (72, 56), (58, 58), (22, 58.4), (11, 57.6), (5, 55.6)])
    fin = p.shape(across("#a8141c", "#d8262c", "#8c0f18", start=76, end=100), [(76, 45), (90, 19), (97.5, 18), (95, 47)])
    p.shape("#e8edf2", [(86.5, 31), (88.5, 27), (97, 26), (96.6, 30)], alpha=.9, clip=fin)
    body = p.shape(down("#ffffff", "#fbfcfd", "#e4e9ee", "#a9b4c0", "#7b8793", start=42, end=59), hull)
    p.shape("#c01f26", smooth([(2, 54), (30, 54), (70, 53), (99, 47), (99, 49), (72, 55.4), (30, 56), (2, 56)]), clip=body)
    p.shape("#1c2836", [(7.4, 49.6), (10.8, 47), (14.4, 46.8), (14, 49.4)])
    for x in range(19, 84, 2): p.oval("#2b3a4c", x, 49.2, .55, .85)
    for x in (17, 40, 85): p.line("#9aa5b1", [(x, 46.5), (x, 53)], .4)
    for x, y in ((61, 75), (46, 63.5)):                              # engines, then the near wing above them
        p.blob(down("#f6f8fa", "#bcc6d0", "#5f6b77", start=y - 5, end=y + 5),
               [(x - 9, y - 4), (x, y - 4.6), (x + 9, y - 2.4), (x + 9, y + 2), (x, y + 4.4), (x - 9, y + 4)])
        p.oval("#e8edf1", x - 9.4, y, 1.8, 4.3); p.oval("#161d25", x - 9.6, y, 1.3, 3.5)
    p.shape("#4e5a66", [(36, 58), (58, 57.4), (62, 60), (38, 61)], soft=1, alpha=.5, clip=body)
    p.shape(down("#f4f7f9", "#cdd5dc", "#8f9ba7", start=54, end=90),
            smooth([(36, 55.5), (46, 54.6), (58, 56), (64, 60), (78, 78), (88, 91), (83, 91.6), (68, 80), (50, 65)], n=6))
    p.line("#8793a0", [(60, 59), (84, 89)], .7)
    p.shape(down("#e4e9ee", "#97a3af", start=47, end=60), [(85, 48), (93, 47.6), (100, 58), (96, 58.6)])
    return p

def ship():
    "A cargo ship at sea."
    rnd, p = Random(10), Picture(down("#5f9fd8", "#9cc7e8", "#d8e8f0", "#e6eef0", end=62))
    for _ in range(40): p.oval("#ffffff", rnd.uniform(0, 100), rnd.gauss(24, 8), rnd.uniform(5, 13), rnd.uniform(1, 2.4), soft=2, alpha=.25)
    p.shape(down("#5e93b4", "#2f6f9a", "#1c5480", "#123c62", start=58, end=100), box(0, 58, 100, 100))
    p.shape("#16242f", [(4, 74), (98, 74), (90, 88), (14, 88)], soft=4, alpha=.55)
    for x, y, h in ((68, 27, 30), (68, 22, 9)):
        p.shape(across("#ffffff", "#f0f2f4", "#c2cad2", start=x, end=x + 20), box(x, y, x + (18 if h > 9 else 14), y + h))
    for y in (34, 39.5, 45): p.shape("#d0d7dd", box(68, y - 2.2, 86, y - 1.6)); [p.shape("#27405a", box(x, y - .8, x + 1.7, y + 1.4)) for x in range(70, 85, 3)]
    p.shape("#1c2f42", box(69, 24, 81, 27.4)); p.line("#4b545c", [(74, 22), (74, 10)], .9); p.line("#4b545c", [(71, 14), (77, 14)], .6)
    p.shape(across("#c0392b", "#e2574a", "#8a2018", start=85, end=92), [(85, 26), (92, 27), (92, 52), (85, 52)])
    p.shape("#22252a", [(85, 25), (92, 26), (92, 30), (85, 29)])
    for _ in range(14):
        t = rnd.random(); p.oval("#6f757a", 89 + 12 * t, 22 - 12 * t, 1.6 + 3 * t, soft=1.5, alpha=.3)
    colours = ["#c8402e", "#2d6fb0", "#e0a92c", "#3a8a58", "#d8dce0", "#8a4a9a", "#e07a2a", "#27506e"]
    for i in range(6):                                               # containers
        for k in range(3 if 0 < i < 5 else 2):
            x, y, c = 18 + i * 8.2, 49 - k * 6, rnd.choice(colours)
            m = p.shape(c, box(x, y, x + 7.8, y + 5.7))
            for u in range(5): p.line("#000000", [(x + 1 + 1.5 * u, y), (x + 1 + 1.5 * u, y + 6)], .4, alpha=.25, clip=m)
            p.shape("#ffffff", box(x, y, x + 7.8, y + 1), alpha=.25)
    hull = p.shape(down("#38567c", "#24406a", "#17294a", start=50, end=74),
                   [*smooth([(2, 47), (7, 51), (14, 54), (40, 55), (80, 54.6), (97, 52)], False), (96, 66), (92, 78), (12, 78), (8, 66)])
    p.shape(down("#b8382c", "#7c1d18", start=69, end=78), box(0, 70, 100, 80), clip=hull)
    p.line("#f2f4f5", [(6, 69.6), (97, 69.6)], .9, clip=hull)
    p.line("#8fb0d0", smooth([(2, 47), (7, 51), (14, 54), (40, 55), (80, 54.6), (97, 52)], False), .9, alpha=.8)
    p.oval("#10182a", 12, 58.5, 1.2); p.line("#e8edf0", [(20, 60.5), (34, 60.5)], 1.7, alpha=.85)
    for _ in range(90):                                              # waves, larger towards the front
        t = rnd.random()
        x, y = rnd.uniform(-4, 104), 60 + 40 * t
        if y < 77 and 2 < x < 100: continue
        p.line(rnd.choice(["#a9cde0", "#7fb0cc", "#0f3556"]), smooth([(x, y), (x + 2 + 2 * t, y - .8), (x + 5 + 4 * t, y)], False), .4 + .6 * t, alpha=.5)
    for _ in range(60):                                              # foam along the hull
        x = rnd.uniform(4, 99)
        p.oval("#ffffff", x, 78 + rnd.uniform(-.8, 1.4) + (1 if x < 16 else 0), rnd.uniform(1, 3.2), rnd.uniform(.5, 1.2), soft=.5, alpha=.6)
    p.blob("#ffffff", [(3, 79), (9, 73), (13, 77), (20, 80)], soft=1, alpha=.8)
    return p

def automobile():
    "A red car on a road."
    rnd, p = Random(11), Picture(down("#8fbde4", "#c6dff0", "#e6eef0", end=45))
    p.shape("#5a8a3c", box(0, 36, 100, 60), soft=3)
    for _ in range(140):
        x, y = rnd.uniform(-4, 104), rnd.uniform(20, 52)
        p.oval(ramp(["#9ab86a", "#5a8a3c", "#2f5a28"], (y - 20) / 32 + rnd.uniform(-.2, .2)), x, y + 6 * sin(x / 11), rnd.uniform(3, 7), soft=1.8, alpha=.7)
    p.shape(down("#7d9a4a", "#8a9a5a", "#9a9a92", start=50, end=62), box(0, 52, 100, 64), soft=1)
    p.shape(down("#8b8d90", "#6d6f73", "#55575b", start=60, end=100), box(0, 61, 100, 100))
    p.shape("#e8e6d8", [(0, 92), (100, 92), (100, 94), (0, 94)], alpha=.7)
    p.oval("#17181a", 50, 82.5, 48, 5.5, soft=2.5, alpha=.9)
    p.shape(down("#f2594a", "#c81e1a", start=34, end=54),
            smooth([(13, 53), (22, 44), (31, 37), (42, 34.4), (55, 34.6), (64, 38), (78, 51)], False) + [(78, 56), (13, 56)])
    body = p.shape(down("#ff6a55", "#e02a22", "#c2181a", "#8a0d12", "#4e060a", start=48, end=82),
                   smooth([(2.4, 62), (3.4, 55.6), (8, 52), (22, 51), (50, 50.4), (76, 50.6), (88, 53), (95.6, 58), (97.6, 65), (96.6, 74),
                           (92, 78.6), (50, 80), (8, 79), (3, 74), (2, 68)]))
    for pts in (smooth([(21, 50.6), (27, 44.4), (33, 39.8), (41, 37.6), (46.4, 37.2)], False) + [(47.4, 50.4)],
                smooth([(49.4, 37.2), (55, 37.4), (61, 40), (67, 45), (73, 50.6)], False) + [(50.4, 50.4)]):
        glass = p.shape(down("#2c3a46", "#566d7d", "#8ba4b2", start=36, end=51), pts)
        x = pts[len(pts) // 2][0]
        p.shape("#dfeaf0", [(x, 34), (x + 6, 34), (x + 1, 52), (x - 5, 52)], alpha=.4, clip=glass)
    p.line("#7a1014", [(34, 39), (37, 50.4)], 1)
    p.line("#ffb3a6", smooth([(6, 56), (22, 53.4), (50, 52.6), (78, 53), (92, 57.6)], False), 1.3, soft=.6, alpha=.8, clip=body)
    p.line("#5a080c", [(6, 68), (95, 68)], .6, alpha=.7, clip=body); p.shape("#2a0406", box(0, 75.4, 100, 82), alpha=.6, clip=body)
    for x, u in ((26, 30), (48.6, 49), (73.6, 71)): p.line("#5a080c", [(x, 50.6), (u, 75)], .5, alpha=.8, clip=body)
    for x in (44, 66): p.line("#f2c9c2", [(x - 2.4, 57.4), (x + 1.6, 57.4)], 1.1)
    p.blob("#b81a18", [(69, 48.6), (72, 46.4), (75, 47.4), (74.6, 50.4), (70, 50.6)])
    p.blob("#fff6d8", [(89, 56.4), (94, 58.6), (96.8, 63), (90.6, 61.8)]); p.blob("#ff9a50", [(3.2, 58), (7, 57), (7.4, 63), (2.8, 64)])
    p.line("#20242a", [(91, 71.6), (96.6, 71.6)], 2.4); p.line("#d8dcdf", [(2.6, 71.6), (8, 71.6)], 1.4)
    for x in (21.5, 78.5):
        p.shape("#17090a", arc(x, 73.5, 11.6, 11.6, 180, 360) + [(x + 11.6, 80), (x - 11.6, 80)], clip=body)
        p.oval(ball("#33353a", "#1d1e21", "#0c0c0e", at=(x - 2, 71), r=12), x, 74.6, 9.8)
        p.oval(ball("#ffffff", "#c4c9ce", "#8b9197", at=(x - 2, 72), r=9), x, 74.6, 6.6)
        for i in range(5): p.shape("#2a2c30", arc(x, 74.6, 5.6, 5.6, 72 * i + 18, 72 * i + 54, n=6) + arc(x, 74.6, 2.4, 2.4, 72 * i + 50, 72 * i + 22, n=4))
        p.oval("#d8dcdf", x, 74.6, 1.7)
    return p


PICTURES = {o.__name__: o for o in (apple, orange, sunflower, clock, mountain, rocket, cloud, bottle, airplane, ship, automobile)}

if __name__ == "__main__":
    for name, draw in PICTURES.items(): draw().im.reduce(SCALE).save(Path(__file__).with_name(f"{name}.png"), optimize=True)
