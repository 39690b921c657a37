"""How pages look: one style sheet, light or dark as the reader's system is."""

from __future__ import annotations

# (on light, on dark), each with a contrast of 3:1 or more to the paper of its scheme.
PALETTE = (
    ("#0b62d6", "#6ea8fe"),
    ("#c2410c", "#fb923c"),
    ("#15803d", "#4ade80"),
    ("#7e22ce", "#c084fc"),
    ("#be123c", "#fb7185"),
    ("#0e7490", "#22d3ee"),
    ("#8a6100", "#facc15"),
    ("#9d174d", "#f472b6"),
)
PAPER = ("#ffffff", "#1b1e23")

# Backgrounds of words, from what was expected to what was a surprise; ink stays legible on each.
HEAT = (
    ("#e6f4ea", "#12301d"),
    ("#fdf3d0", "#3a3212"),
    ("#fcd9a8", "#553a10"),
    ("#f7b58a", "#7a3b14"),
    ("#f08f8f", "#8c2626"),
)
INK = ("#1b1f24", "#e8eaed")
# Behind a probability, as long as it is large.
BAR = ("#d5e3fa", "#24456f")
# Numbers that one text can be coloured by.
MAX_SHADES = 7

_COLOURS = "".join(
    f".c{index} {{ --c: light-dark({light}, {dark}); }}\n" for index, (light, dark) in enumerate(PALETTE)
)
_HEATS = "".join(
    f"{', '.join([f'.h{step}', *(f'.by{n}:checked ~ .words .s{n}{step}' for n in range(MAX_SHADES))])}"
    f" {{ background: light-dark({light}, {dark}); }}\n"
    for step, (light, dark) in enumerate(HEAT)
)
_LAST = ", ".join(f".by{n}:checked ~ .words .s{n}{len(HEAT) - 1}" for n in range(MAX_SHADES))
_KEYS = ", ".join(f".by{n}:checked ~ .key{n}" for n in range(MAX_SHADES))
# Texts of distily.html.tokens. Details stand below their line, and where the browser can tell where the word
# is, below the word; a pointer goes through them to the next line.
_TOKENS = (
    """
.sample { margin: .8rem 0; }
.sample input { position: absolute; opacity: 0; pointer-events: none; }
.sample > label { display: inline-block; cursor: pointer; padding: .1rem .6rem; margin: 0 .3rem .3rem 0;
  border: 1px solid var(--rule); border-radius: 1rem; font-size: .85rem; overflow-wrap: anywhere; }
.sample > :checked + label { border-color: currentColor; font-weight: 600; }
.sample > :focus-visible + label { outline: 2px solid currentColor; outline-offset: 1px; }
.key { display: none; }
.key span { display: inline-block; padding: 0 .4rem; border-radius: 3px; color: var(--ink); }
.words { position: relative; padding: .7rem .8rem; margin: .5rem 0; line-height: 1.9; white-space: pre-wrap;
  overflow-wrap: anywhere; font-size: .95rem; }
.words label { padding: .1rem 0; border-radius: 3px; cursor: help; }
.words label:hover, .words label:focus-within { outline: 2px solid currentColor; }
.tip { display: none; position: absolute; left: .4rem; right: .4rem; z-index: 1; padding: .5rem .7rem;
  pointer-events: none; white-space: normal; font-size: .85rem; line-height: 1.4;
  background: var(--paper); border: 1px solid var(--soft); border-radius: .5rem;
  box-shadow: 0 .3rem 1rem #0004; }
label:hover > .tip, label:focus-within > .tip { display: block; }
label:hover > .tip { z-index: 2; }
label:has(:focus-visible) > .tip { z-index: 3; }
@supports (anchor-scope: all) {
  .words label { anchor-name: --word; anchor-scope: --word; }
  .tip { position-anchor: --word; position-area: bottom span-all; align-self: unsafe start;
    left: auto; right: auto; width: max-content; max-width: 100%; margin: 3px 0; }
}
.guesses { display: flex; flex-wrap: wrap; gap: .5rem .8rem; }
.guesses > span { width: min(13rem, 50vw - 2.3rem); overflow-wrap: anywhere; }
.guesses > :only-child { width: 20rem; max-width: 100%; }
.guesses small { display: block; color: var(--soft); font-size: .8rem; }
.g { display: flex; justify-content: space-between; gap: .8rem; margin-top: 2px; padding: 0 .3rem;
  background: linear-gradient(var(--bar), var(--bar)) no-repeat 0 0 / var(--p) 100%; }
.g bdi { overflow-wrap: anywhere; }
.own { font-weight: 700; }
.own bdi::before { content: "✓ "; }
"""
    f"{_HEATS}{_LAST} {{ text-decoration: underline dotted; text-underline-offset: 3px; }}\n"
    f"{_KEYS} {{ display: block; }}\n"
)
STYLE = (
    """
:root { color-scheme: light dark;
  --soft: light-dark(#5b6470, #a9b1bb); --shade: light-dark(#c3c9d1, #000000);
  --rule: light-dark(#e1e4e8, #363b43); --back: light-dark(#f5f6f8, #111316);
"""
    f"  --ink: light-dark({INK[0]}, {INK[1]}); --bar: light-dark({BAR[0]}, {BAR[1]});\n"
    f"  --paper: light-dark({PAPER[0]}, {PAPER[1]}); }}\n{_COLOURS}"
    """
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: var(--back); -webkit-text-size-adjust: 100%;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .4rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
p { max-width: 48rem; margin: .4rem 0; overflow-wrap: anywhere; }
.note { color: var(--soft); font-size: .9rem; }
.cards > div, figure, .scroll, pre, .words { background: var(--paper); border: 1px solid var(--rule);
  border-radius: .5rem; }

.cards, .row { display: grid; gap: .8rem; margin: .8rem 0; }
.cards { grid-template-columns: repeat(auto-fill, minmax(8.2rem, 1fr)); }
.cards > div { padding: .6rem .8rem; }
.cards b { display: block; font-size: 1.25rem; line-height: 1.3; overflow-wrap: anywhere; }
.cards span { color: var(--soft); font-size: .85rem; }
.row { grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); }
figure { margin: 0; padding: .7rem .8rem; min-width: 0; }
.hover { fill: transparent; stroke: none; }
.hover:hover { fill: var(--c); fill-opacity: .3; }
th button { all: unset; cursor: pointer; }
th button:focus-visible { outline: 2px solid currentColor; }
th button::after { content: " ↕"; opacity: .4; }
th[aria-sort=ascending] button::after { content: " ↑"; opacity: 1; }
th[aria-sort=descending] button::after { content: " ↓"; opacity: 1; }
figcaption { font-weight: 600; margin-bottom: .3rem; }
figure .note { margin: .3rem 0 0; }

.scroll { overflow-x: auto; max-width: 100%; width: fit-content; margin: .8rem 0;
  /* A shade at the side where there is more; the paper that covers it scrolls along. */
  background: linear-gradient(to left, var(--paper) 40%, transparent) right / 2.5rem 100% no-repeat local,
    linear-gradient(to left, var(--shade), transparent) right / .7rem 100% no-repeat scroll, var(--paper); }
.row > .scroll { margin: 0; width: auto; }
.tall { max-height: 26rem; overflow-y: auto; }
table { border-collapse: separate; border-spacing: 0; font-size: .9rem; font-variant-numeric: tabular-nums; }
.scroll table { min-width: max-content; }
.row .scroll table { min-width: 0; width: 100%; }
.facts td { overflow-wrap: anywhere; }
.facts th { white-space: nowrap; }
caption { text-align: left; font-weight: 600; padding: .6rem .8rem .2rem; font-size: 1rem; }
td, th { padding: .35rem .5rem; border-top: 1px solid var(--rule); text-align: left; vertical-align: top;
  max-width: 24rem; overflow-wrap: break-word; }
thead th { border-top: 0; color: var(--soft); font-weight: 500; vertical-align: bottom; }
tbody th { font-weight: 500; max-width: min(24rem, 46vw); }
th:first-child, td:first-child { padding-left: .8rem; }
thead th:first-child, tbody th { position: sticky; left: 0; background: var(--paper); }
.written { white-space: pre-wrap; overflow-wrap: anywhere; }
td.n, th.n { text-align: right; white-space: nowrap; }
pre { padding: .7rem .8rem; margin: .3rem 0 .8rem; white-space: pre-wrap; overflow-wrap: anywhere; }
pre, code { font: .85rem/1.5 ui-monospace, "DejaVu Sans Mono", monospace; }

svg { display: block; width: 100%; height: auto; }
svg text { font-size: 13px; fill: var(--soft); }
.grid { stroke: var(--rule); stroke-width: 1; }
.line { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round; }
.dashed { stroke-dasharray: 6 4; }
.mark { fill: var(--c); stroke: var(--paper); }
.legend, .bars { list-style: none; margin: .3rem 0 0; padding: 0; font-size: .85rem; }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1rem; }
.legend li { display: flex; gap: .4rem; min-width: 0; overflow-wrap: anywhere; }
.legend svg { flex: none; width: 24px; height: 12px; margin-top: .3rem; }
.bars li { display: grid; grid-template-columns: 1fr auto; gap: 0 .8rem; margin-top: .4rem; }
.bars span { overflow-wrap: anywhere; }
.bars i { grid-column: 1 / -1; height: .6rem; border-radius: 2px; background: var(--c); min-width: 2px; }
"""
    f"{_TOKENS}"
)
