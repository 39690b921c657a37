"""The demo's sections: nothing of the text is lost, and they are as long as they may be."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from pipeline.demo import sections

PARAGRAPHS = st.lists(
    st.text("ab \n", min_size=1).filter(lambda one: "\n\n" not in f"\n{one}\n"), max_size=12
)


@given(PARAGRAPHS, st.integers(1, 40))
def test_sections_are_the_text_cut_between_paragraphs(paragraphs: list[str], longest: int) -> None:
    text = "\n\n".join(paragraphs).strip()
    found = sections(text, longest)
    assert "\n\n".join(found) == text
    assert all(len(one) <= longest or "\n\n" not in one for one in found)
    # No two neighbours would have fitted together.
    assert all(len(one) + 2 + len(other.split("\n\n")[0]) > longest for one, other in pairwise(found))
