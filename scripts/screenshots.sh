#!/usr/bin/env bash
# Pictures of both reports for docs/reports.md, from a real browser: screenshots.sh STORE RUN...
# The RUNs of the picture of tokens are those that `distily-train eval` has evaluated.
# Needs chromium (or CHROMIUM=...) and pngquant, e.g. `apt-get install chromium pngquant`. The commands come from
# the environment that is active.
set -euo pipefail
store=$1
shift
img="$(cd "$(dirname "$0")/.." && pwd)/docs/img"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$img"

distily-cache report "$store" --out "$work/store.html"
distily-train report "$@" --out "$work/train.html"

# Nobody needs the paths of this machine.
sed -i "s#$(dirname "$(realpath "$store")")/##g" "$work"/*.html

# Samples alone, with the details of a token open as the keyboard opens them.
perl -0pe 's/<\/style>/main > :not(section:has(.sample)) { display: none }$&/;
  s/<input( type="radio" name="w0")/++$n == 50 ? "<input autofocus$1" : $&/ge' "$work/train.html" >"$work/tokens.html"

shoot() { # page, picture, width, height, pixels per unit, colour scheme of Blink's settings (0 dark, 1 light)
  "${CHROMIUM:-chromium}" --headless=new --no-sandbox --disable-gpu --hide-scrollbars --user-data-dir="$work/profile" \
    --force-device-scale-factor="$5" --blink-settings="preferredColorScheme=$6" \
    --window-size="$3,$4" --screenshot="$work/$2.png" "file://$work/$1.html" 2>"$work/log" || {
    cat "$work/log" >&2
    exit 1
  }
  pngquant --force --strip --output "$img/$2.png" 128 "$work/$2.png"
}

shoot store report-store 1280 1500 1 1
shoot store report-store-dark 1280 1500 1 0
shoot store report-store-phone 390 2400 1 1
shoot train report-train 1280 1500 1 1
shoot train report-train-dark 1280 1500 1 0
shoot train report-train-phone 390 2400 1 1
shoot tokens report-tokens 1280 600 1 1
ls -l "$img"/report-*.png
