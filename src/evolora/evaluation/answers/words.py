"""Caption words: the Penn Treebank tokens that caption metrics count, without Java.

The reference (pycocoevalcap) runs Stanford's PTBTokenizer in lower case and leaves out a list of
punctuation. This is the same convention by a few rules, and no port of that program:

- contractions are cut: "don't" is do n't, "dog's" is dog 's, "cannot" is can not;
- words stay whole over - / & . _ and numbers over , . : inside ("t-shirt", "and/or", "9:30");
- initials and a list of abbreviations keep their full stop ("u.s.", "mr."), except for a single
  letter that ends the text (there the reference looks at the next caption of the file);
- quotes, dashes, commas, colons, semicolons and lone . ? ! are left out, other symbols are words;
- brackets are words ("-lrb-"), because the reference looks for them in capitals and misses them;
- characters outside the basic plane (emoji) are left out.
"""

from __future__ import annotations

import re

_STRAIGHT = str.maketrans("“”‘’–—…", "\"\"''   ")
_OUTSIDE_BASIC_PLANE = re.compile("[\U00010000-\U0010ffff]")

_LETTERS = r"[^\W_]+"
_CLITIC = r"'(?:s|m|d|re|ve|ll)(?!\w)"
_ABBREVIATIONS = (
    "mr mrs ms dr st jr sr mt ave blvd rd vs etc inc co corp ltd bros jan feb mar apr jun jul aug "
    "sep sept oct nov dec sgt lt gen col capt prof rev hon pres gov sen rep ft sq est fig vol"
)
_TOKEN = re.compile(
    "|".join(
        (
            r"(?:https?://|www\.)[^\s<>\"]*[\w/]",
            r"[\w.+-]+@\w+(?:\.\w+)+",  # an address
            r"[@#][A-Za-z]\w*",
            r"</?[A-Za-z][^<>]*>",
            rf"(?:{'|'.join(_ABBREVIATIONS.split())})\.(?!\w)",
            r"no\.(?=\s*\d)",
            r"(?<![\w'])[a-z](?:(?:\.[a-z])+\.(?!\w)|\.(?=\s+\w))",  # initials
            r"(?<!\S)[-+]?\d+(?:[.,:]\d+)+|\d+(?:[.,:]\d+)+|(?<!\S)[-+]\d+",
            rf"{_LETTERS}?(?=n't(?!\w))|n't(?!\w)|{_CLITIC}",
            r"'(?:\d\ds?|em|n'?)(?!\w)",
            rf"{_LETTERS}(?:(?:[-/&._]|(?!{_CLITIC})'){_LETTERS})*",
            r"[?!]{2,}|\*+|_+|\S",
        )
    ),
    re.IGNORECASE,
)
_LEFT_OUT = frozenset("' \" ` . ? ! , : - ;".split())
_WRITTEN = {
    "(": "-lrb-",
    ")": "-rrb-",
    "[": "-lsb-",
    "]": "-rsb-",
    "{": "-lcb-",
    "}": "-rcb-",
    "€": "$",
    "£": "#",
    "¢": "cents",
}
_CUT = {
    "cannot": ("can", "not"),
    "gimme": ("gim", "me"),
    "gonna": ("gon", "na"),
    "gotta": ("got", "ta"),
    "lemme": ("lem", "me"),
    "wanna": ("wan", "na"),
    "y'all": ("y'", "all"),
}


def caption_words(text: str) -> list[str]:
    """Return the words of a caption, in lower case."""
    straight = _OUTSIDE_BASIC_PLANE.sub(" ", text).translate(_STRAIGHT)
    words: list[str] = []
    for found in _TOKEN.findall(straight):
        word = found.lower()
        if word not in _LEFT_OUT:
            words += _CUT.get(word) or (_WRITTEN.get(word, word),)
    return words
