"""Texts: what a catalogue says is not trusted. It is made readable, and what speaks to a model instead of a buyer goes.

This is hygiene, not a wall: only plain English instructions are known, and a text can still lie. The renderer keeps a
text from leaving its place in the prompt; this is for what reaches people, and models behind a server.
"""

import html
import re
import unicodedata
from html.entities import html5
from typing import Literal, get_args

Removal = Literal["bidi", "chat_marker", "control", "cut", "html", "instruction", "invisible", "marks"]
REMOVALS: tuple[Removal, ...] = get_args(Removal)
"""What `clean` can take out of a text.

bidi: characters that turn the reading direction. chat_marker: what separates the turns of a conversation in a model's
template. control: control, private-use and unassigned characters, lone surrogates. cut: the end of a text that is too
long. html: tags, comments and scripts; entities are replaced by their characters. instruction: sentences that tell a
model what to answer. invisible: characters without a width. marks: accents piled up on one letter.
"""

MAX_CHARS = 20_000
_MAX_RAW = 10 * MAX_CHARS
"""Characters that are looked at: what stands behind so much mark-up is not worth the time."""

MAX_MARKS = 3
"""Combining marks on one letter; pointed Hebrew and Vietnamese, which have the most, need no more."""

_MAX_PASSES = 8
"""Honest texts are finished after two; what is nested deeper than this was made to unfold."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Characters

_LINE_END = re.compile("\r\n|[\r\v\f\x85\u2028\u2029]")
_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_BLANK = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0")
"""Invisible without being format characters (Cf): fillers and vowels that are never written."""
_JOINERS = "\u200c\u200d"
_JOINER_RUN = re.compile(f"[{_JOINERS}]+")
_SIGNS = frozenset("\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd")
"""Format characters that are written: number and verse signs."""
_SELECTORS = "\ufe00-\ufe0f\U000e0100-\U000e01ef"
_LONE_SELECTORS = re.compile(f"(?<![^\\sA-Za-z{_SELECTORS}])[{_SELECTORS}]+")

# Mark-up. Not html.parser: to it "a <b and c> d" has a tag, and its reading of broken mark-up changes with Python's
# version. Quantifiers are bounded or possessive, so that no text takes more than linear time.

_AMPERSANDS = re.compile(r"&(?:(?:amp|#0{0,5}38|#x0{0,5}26);)+", re.IGNORECASE)
_ENTITY = re.compile(r"&(?:#\d{1,10}|#[xX][0-9a-fA-F]{1,8}|[A-Za-z][A-Za-z0-9]{1,31});")
_HIDDEN = (
    (re.compile(r"<!--.*?-->", re.DOTALL), re.compile("-->")),
    (re.compile(r"<script(?=[\s/>]).*?</script\s*+>", re.DOTALL | re.I), re.compile(r"</script\s*+>", re.I)),
    (re.compile(r"<style(?=[\s/>]).*?</style\s*+>", re.DOTALL | re.I), re.compile(r"</style\s*+>", re.I)),
)
"""(What is removed with its content, its end)."""
_BLOCKS = _words(
    "address article aside blockquote body br center dd details dialog div dl dt fieldset figcaption figure footer "
    "form h1 h2 h3 h4 h5 h6 head header hr html li main nav ol option p pre section summary table tbody tfoot thead "
    "title tr ul"
)
_CELLS = _words("button embed iframe img input object select svg td textarea th video audio canvas")
_INLINE = _words(
    "a abbr acronym b base basefont bdi bdo big caption cite code col colgroup data datalist del dfn em font frame "
    "frameset i ins kbd label legend link map mark marquee meta nobr noscript o:p param path picture q rp rt ruby samp "
    "script slot small source span strike strong style sub sup template time track tt u var wbr"
)
_BARE = _words(
    "async autofocus autoplay checked controls default defer disabled hidden itemscope loop multiple muted nowrap "
    "noshade open readonly required reversed selected"
)
"""Attributes that stand without a value; with other words "a <b and c> d" is a comparison."""
_TAG = re.compile(
    r"</?(?P<name>{})(?P<attributes>(?:[\s/]++{}(?:\s*+=\s*+{})?+){{0,50}}+)[\s/]*+>".format(
        "|".join(sorted(_BLOCKS | _CELLS | _INLINE, key=len, reverse=True)),
        r"""[^\s"'<>=/]{1,100}+""",
        r"""(?:"[^"]{0,5000}+"|'[^']{0,5000}+'|[^\s"'<>]{1,5000}+)""",
    ),
    re.IGNORECASE,
)
_DECLARATION = re.compile(r"<!doctype\b[^<>]{0,500}>|<\?xml\b[^<>]{0,500}>|<!\[CDATA\[|\]\]>|<!--", re.IGNORECASE)

# Conversation

_ROLE = r"(?:system|user|assistant|tool|developer|model)"
# A turn of the assistant that somebody wrote into a text is no part of it: up to the next marker or the line's end.
_FORGED = re.compile(
    r"(?:<[|｜](?:im_start|start_header_id)[|｜]>|<start_of_turn>)\s*(?:assistant|model)\b(?:<[|｜][^<>|｜\n]{1,64}[|｜]>)?\s*[^<\n]*"
)
_MARKER = re.compile(
    rf"<[|｜][^<>|｜\n]{{1,64}}[|｜]>(?:{_ROLE}(?=\s*(?:\n|<[|｜]|\Z)))?"
    rf"|<start_of_turn>(?:{_ROLE}(?=\s*(?:\n|\Z)))?"
    r"|<</?SYS>>|\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|IMG|IMG_BREAK|IMG_END)\]"
    r"|</?(?:s|bos|eos|pad|unk|image|image_soft_token|end_of_turn|start_of_image|end_of_image|end_of_utterance|think"
    r"|fake_token_around_image|global-img|row_\d{1,2}_col_\d{1,2}|tool_call|tool_response)>"
)
_TURN = re.compile(
    r"^(?:[ \t]*(?:#{2,4}[ \t]*(?:system|instructions?|input|response|user|human|assistant)|system|user|assistant)"
    r"[ \t]*:[ \t]*)+",
    re.IGNORECASE | re.MULTILINE,
)

# Instructions. Each pattern needs a command about answers, recommending, instructions or prompts, and, where the words
# alone also occur in titles and plots, a command's place: at the beginning of a clause or behind "you must".

_QUOTE = "\"'“”‘’«»*`"
_BEGINS = (
    rf"(?:^|(?<=[.!?;:,\n(\[{{{_QUOTE}–—|>-])|(?<=[.!?;:,–—|>-]\s)"
    r"|(?<=\band\s)|(?<=\bthen\s)|(?<=\bbut\s)|(?<=\bso\s)|(?<=\binstead\s))"
)
_ADDRESS = (
    r"(?:(?:dear|hey|please|now|always|only|just|simply|definitely|instead|the|ai|llm|model|assistant|chatbot|therefore"
    r"|you|must|should|shall|will|(?:have|need|are|are required|are instructed)\s+to)[\s,:]{1,3}){0,8}"
)
_ADVERBS = r"(?:(?:always|now|only|simply|just|definitely)\s+){0,2}"
_DUTY = rf"\byou\s+{_ADVERBS}(?:must|should|have\s+to|need\s+to|are\s+(?:\w{{1,12}}\s+)?to)\s+{_ADVERBS}"
_NO_SUBJECT = "".join(
    rf"(?<!\b{word}\s)" for word in ("to", "i", "they", "we", "who", "will", "would", "can", "must", "should", "not")
)
_EARLIER = r"(?:previous|previously\s+given|prior|above|earlier|preceding|foregoing|former|system|initial|original)"
_NOUN = r"(?:instruction|prompt|direction|guideline|command|directive|message|rule|constraint)s?\b"
_IGNORE = r"(?:ignore|disregard|forget|override|(?:do\s+not|don['’]t|stop)\s+(?:follow|obey|following|obeying))"
_LABEL = (
    rf"(?:yes\b|no\b(?=[{_QUOTE})\]]{{0,2}}\s*(?:[.!?;,)\n]|\Z|(?:for|when|regardless|otherwise)\b"
    r"|to\s+(?:all|any|every|other)\b)))"
)
_YES = (
    r"(?:with\s+)?(?:(?:a|the\s+word|the\s+answer|simply|only|just|always|with|clear)\s+){0,3}"
    rf"(?:[{_QUOTE}]{_LABEL}[{_QUOTE}]|{_LABEL})(?!\s*(?:/|,?\s*(?:or|and)\b)\s*[{_QUOTE}]?no\b)"
)
_THIS = r"(?:this|it|our|these)"
_THING = r"(?:item|product|article|film|movie|book|title|candidate|option|one)s?"
_COMMANDS = (
    rf"{_IGNORE}\s+(?:all|any|every)\s+(?:of\s+)?(?:the\s+|your\s+|other\s+)?(?:instruction|prompt)s?\b",
    rf"{_IGNORE}\s+your\s+(?:\w{{1,20}}\s+)?(?:instruction|prompt|guideline|directive)s?\b",
    rf"{_IGNORE}\s+(?:all|everything|anything|the\s+text|what\s+is|what\s+was)\s+(?:of\s+)?"
    r"(?:the\s+|that\s+(?:is|was|came)\s+|written\s+|said\s+)?(?:above|before\s+this)\b",
    r"(?:ignore|disregard)\s+(?:everything|anything|all|what(?:ever)?)\s+(?:that\s+)?you\s+(?:were|have\s+been)\s+"
    r"(?:told|given|instructed)\b",
    rf"(?:answer|respond|reply|output|print|write|return)\s+{_YES}",
    r"(?:answer|respond|reply|output)\s+only\s+(?:with|in|by|using)\b",
    r"(?<=only\s)(?:answer|respond|reply|output)\s+(?:with|in|by|using)\b",
    # Films are called "Always Say Yes": only an instruction writes the verb small or names what is asked.
    rf"(?:(?<=always\s)|(?<=only\s))(?-i:say)\s+{_YES}",
    rf"say\s+{_YES}\s*(?:to|for|about|when|whenever|if|regardless)\s+(?:\w{{1,20}}\s+){{0,3}}?"
    rf"(?:{_THING}|questions?|asked|users?|recommendations?)\b",
    rf"(?:(?<=always\s)|(?<=only\s))(?:recommend|rank|promote|suggest|score)\s+{_THIS}\b",
    rf"(?:rank|score)\s+{_THIS}\s+(?:{_THING}\s+)?"
    r"(?:first|highest|(?:at|on|to)\s+(?:the\s+)?top|as\s+(?:number\s+one|the\s+best)|above\s+(?:all|every|the\s+other))\b",
    rf"(?:place|put)\s+{_THIS}\s+(?:{_THING}\s+)?(?:first|at\s+the\s+top|on\s+top)\s+(?:in|of)\s+(?:the|your|every|each)\s+"
    r"(?:\w{1,20}\s+)?(?:list|ranking|recommendation|result)s?\b",
    rf"(?:recommend|promote|suggest)\s+{_THIS}\s+(?:{_THING}\s+)?to\s+(?:every|all|any|each|the)\s+users?\b",
    r"(?:(?<=\byou\s)are|act\s+as)\s+(?:now\s+)?(?:an?|the|my)\s+(?:\w{1,20}\s+){0,2}?(?:ai\s+(?:assistant|model|system)"
    r"|language\s+model|llm|chatbot|helpful\s+assistant|recommend(?:er|ation)\s+(?:system|model|engine|assistant))\b",
    r"(?:(?:here\s+are\s+)?your\s+)?new\s+(?:instructions?|task)\s*(?::|(?:is|are)\s+to\b)",
    rf"from\s+now\s+on,?\s+{_ADDRESS}(?:answer|respond|reply|recommend|rank|ignore|act\s+as)\b",
)
"""What is a command at the beginning of a clause only."""
_ANYWHERE = (
    rf"\b(?=[idfos])(?:{_NO_SUBJECT}|(?<=\byou\sto\s)|(?<=\bare\sto\s)){_IGNORE}\s+(?:\w{{1,20}}[\s,]+){{0,4}}?"
    rf"{_EARLIER}\s+(?:\w{{1,20}}\s+){{0,3}}?{_NOUN}",
    rf"\b(?=always){_NO_SUBJECT}always\s+(?:answer|respond|reply)\s+{_YES}",
    rf"{_DUTY}(?:answer|respond|reply|say|output|print|write|return)\s+{_YES}",
    rf"{_DUTY}(?:recommend|rank|promote|suggest|score)\s+(?:{_THIS}|only)\b",
    rf"\b(?:your\s+(?:answer|response|reply|output)\s+(?:must|should|will|has\s+to|needs\s+to)\s+(?:always\s+)?be"
    rf"|the\s+(?:correct|expected)\s+(?:answer|response|output)\s+(?:(?:must|should)\s+be|is)(?:\s+always)?)\s+{_YES}",
    r"\bas\s+an?\s+(?:ai\s+)?(?:large\s+)?language\s+model\b",
    r"\bas\s+an?\s+(?:ai|llm|artificial\s+intelligence)(?:\s+(?:model|assistant|system|agent))?,?\s+"
    r"(?:you|i|your|always|answer)\b",
    r"\b(?:reveal|show|print|repeat|output|display|leak|ignore|disregard|override|forget|new|your)\s+"
    r"(?:\w{1,20}\s+){0,3}?system\s+prompt\b",
    r"\bsystem\s+prompt\s*(?::|override\b|update\b)",
)
_INSTRUCTION = re.compile(
    rf"{_BEGINS}{_ADDRESS}(?:{'|'.join(_COMMANDS)})|{'|'.join(_ANYWHERE)}", re.IGNORECASE | re.MULTILINE
)
_MARKS = ".!?;"
_SENTENCE_END = r"[!?;\n]|\.(?!\d)"
_PAIRS = (("(", ")"), ("[", "]"), ("{", "}"), ("“", "”"), ("«", "»"), ('"', '"'), ("‘", "’"), ("'", "'"))
_CONNECTIVES = frozenset(("and", "but", "so", "then", "now", "please", "to", "you", "are"))

_UNFOLDS = {**dict.fromkeys(map(ord, "<>&[](){}“”«»‘’'\"|｜")), ord("\n"): " "}
"""What a text that will not come to an end loses: all that one removal can put together anew for the next."""


def clean(text: str) -> tuple[str, tuple[Removal, ...]]:
    r"""`text` as a buyer may read it, and what had to be removed for that.

    In this order, again and again until nothing changes, since what is left of one thing may form another one:

    1. Characters. At most `MAX_MARKS` combining marks on a letter; Unicode NFC, so that equal looks compare equal; all
       line separators become "\n"; characters that only machines see are removed. Joiners stay where Persian, Indic
       scripts and emoji need them, variation selectors behind what they vary.
    2. HTML. Entities become characters, also those escaped several times; tags go, those of blocks leave a line end;
       comments, scripts and styles go with their content. Other text in angle brackets stays.
    3. Markers of a chat: a model behind a server would take them for turns that nobody has spoken.
    4. Instructions to a model, to the end of their sentence or of the brackets or quotes they stand in; what stands
       before them in the sentence stays.
    5. White space: single spaces, at most one blank line, none at the ends.
    6. Length: `MAX_CHARS`, cut between words.

    NFC, line ends and white space take nothing away and are not reported.

    Returns:
        The text, which `clean` would not change any further, and the removals, sorted, each once.
    """
    removed: set[Removal] = set()
    text = _cut(text, _MAX_RAW, removed)
    passes = 0
    while (cleaned := _clean_once(text, removed)) != text:
        text, passes = cleaned, passes + 1
        if passes == _MAX_PASSES:
            text = text.translate(_UNFOLDS)
            removed.add("html")
    return text, tuple(sorted(removed))


def _clean_once(text: str, removed: set[Removal]) -> str:
    text = _clean_characters(text, removed)
    text = _strip_html(text, removed)
    for pattern in (_FORGED, _MARKER, _TURN):
        text = _substitute(pattern, " ", text, "chat_marker", removed)
    text = _strip_instructions(text, removed)
    text = re.sub(r"[^\S\n]+", " ", text)
    text = re.sub(r" ?\n ?", "\n", text)
    text = re.sub(r"\n{3,}", "\n\n", text).strip()
    return _cut(text, MAX_CHARS, removed)


def _substitute(pattern: re.Pattern[str], by: str, text: str, name: Removal, removed: set[Removal]) -> str:
    text, found = pattern.subn(by, text)
    if found:
        removed.add(name)
    return text


def _cut(text: str, limit: int, removed: set[Removal]) -> str:
    if len(text) <= limit:
        return text
    removed.add("cut")
    # A word of more than 100 characters is none, and may be the whole text.
    end = next((i for i in range(limit, limit - 100, -1) if text[i].isspace()), limit)
    return text[:end].rstrip()


def _clean_characters(text: str, removed: set[Removal]) -> str:
    if text.isascii() and text.isprintable():
        return text
    characters = set(text)
    # Before NFC, which takes quadratic time on long piles.
    marks = "".join(c for c in characters if unicodedata.combining(c) or unicodedata.category(c) in ("Mn", "Me"))
    if marks:
        piles = re.compile(f"([{re.escape(marks)}]{{{MAX_MARKS}}})[{re.escape(marks)}]+")
        text = _substitute(piles, r"\1", text, "marks", removed)
    text = _LINE_END.sub("\n", unicodedata.normalize("NFC", text))
    unwanted = {ord(c): name for c in set(text) if (name := _unwanted(c))}
    removed.update(unwanted.values())
    text = text.translate(dict.fromkeys(unwanted))
    text = _substitute(_LONE_SELECTORS, "", text, "invisible", removed)
    joined = _JOINER_RUN.sub(_keep_joiner, text)
    if joined != text:
        removed.add("invisible")
    return joined


def _unwanted(character: str) -> Removal | None:
    """Why a character is removed wherever it stands; None if it is not."""
    if character in "\n\t" or character in _JOINERS or character in _SIGNS:
        return None
    if character in _BIDI:
        return "bidi"
    category = unicodedata.category(character)
    if category == "Cf" or character in _BLANK or "\U000e0000" <= character <= "\U000e007f":
        return "invisible"
    # What this Python's tables do not know may be this year's emoji or ideographs.
    new = "\U0001f000" <= character <= "\U0001fbff" or "\U00020000" <= character <= "\U0003fffd"
    if category in ("Cc", "Cs", "Co") or (category == "Cn" and not (new and ord(character) & 0xFFFE != 0xFFFE)):
        return "control"
    return None


def _keep_joiner(run: re.Match[str]) -> str:
    """One joiner where writing needs it: between letters or emoji, or behind a virama; never between Latin letters."""
    before, after = run.string[max(0, run.start() - 1) : run.start()], run.string[run.end() : run.end() + 1]
    needed = _joins(before) and (_joins(after) or unicodedata.combining(before) == 9)
    return run[0][0] if needed else ""


def _joins(character: str) -> bool:
    other_script = character >= "\u0590" and not "\u1e00" <= character <= "\u1fff"
    return other_script and unicodedata.category(character)[0] in "LMS"


def _strip_html(text: str, removed: set[Removal]) -> str:
    before = text
    if "&" in text:
        text = _ENTITY.sub(_character, _AMPERSANDS.sub("&", text))
    if "<" in text:
        for hidden, end in _HIDDEN:
            # Behind the last end nothing can match: looking from every beginning would take quadratic time.
            last = max((found.end() for found in end.finditer(text)), default=0)
            text = hidden.sub(" ", text[:last]) + text[last:]
        text = _DECLARATION.sub(" ", _TAG.sub(_space_of_tag, text))
    if text != before:
        removed.add("html")
    return text


def _character(entity: re.Match[str]) -> str:
    # html.unescape also takes the beginning of an unknown name for an entity.
    return html.unescape(entity[0]) if entity[0][1] == "#" else html5.get(entity[0][1:], entity[0])


def _space_of_tag(tag: re.Match[str]) -> str:
    attributes = tag["attributes"]
    if "=" not in attributes and not _BARE.issuperset(attributes.lower().replace("/", " ").split()):
        return tag[0]
    name = tag["name"].lower()
    return "\n" if name in _BLOCKS else " " if name in _CELLS else ""


def _strip_instructions(text: str, removed: set[Removal]) -> str:
    parts: list[str] = []
    done = 0
    while found := _INSTRUCTION.search(text, done):
        removed.add("instruction")
        left = _without_connectives(text[done : found.start()])
        sentence = re.split(_SENTENCE_END, left)[-1]
        closers = "".join(re.escape(b) for a, b in _PAIRS if _is_open(sentence, a, b))
        stop = re.compile(f"{_SENTENCE_END}|[{closers}]" if closers else _SENTENCE_END).search(text, found.end())
        end = len(text) if stop is None else stop.start()
        if stop is not None and stop[0] in _MARKS and not sentence.strip():
            end = stop.end()  # the mark ends nothing any more
        if (left[-1:], text[end : end + 1]) in _PAIRS:
            left, end = left[:-1], end + 1
        parts.append(left if text[end : end + 1] in _MARKS else left + " ")
        done = end
    return "".join(parts) + text[done:]


def _is_open(sentence: str, opener: str, closer: str) -> bool:
    if opener in "‘'":  # elsewhere these may be apostrophes
        return sentence.endswith(opener)
    return bool(sentence.count(opener) % 2 if opener == closer else sentence.count(opener) > sentence.count(closer))


def _without_connectives(left: str) -> str:
    """What stands before an instruction without the words and marks that led over to it."""
    for _ in range(5):
        left = left.rstrip(" \t,:–—|-")
        word = re.search(r"\w+\Z", left[-20:])
        if word and word[0].lower() in _CONNECTIVES:
            left = left.removesuffix(word[0])
    return left
