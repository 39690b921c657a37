"""The one script of the pages: a click on the heading of a sortable table sorts its rows by that column.

Without scripts the table stays as it was written. Cells are compared as numbers where both begin with one;
what is no number comes last, in either direction.
"""

from __future__ import annotations

import hashlib
from base64 import b64encode

SORTABLE = "sortable"
SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  headings.forEach((heading, column) => {
    const button = document.createElement("button");
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const falling = heading.getAttribute("aria-sort") === "ascending";
      const read = (row) => {
        const text = row.cells[column].textContent.replaceAll(",", "").replace("\u2212", "-");
        return [parseFloat(text), text];
      };
      const compare = (left, right) => {
        const [a, s] = read(left), [b, t] = read(right);
        if (isNaN(a) !== isNaN(b)) return isNaN(a) ? 1 : -1;
        const order = isNaN(a) ? s.localeCompare(t) : a - b;
        return falling ? -order : order;
      };
      for (const other of headings) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", falling ? "descending" : "ascending");
      body.append(...[...body.rows].sort(compare));
    });
  });
}
"""
# What a page's policy calls it: this text is run, and no other.
SOURCE = f"'sha256-{b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()}'"
