"""The X-ray on a terminal."""

# Backgrounds of the 256-colour palette: not trained; trained without a model; by rising loss.
PLAIN, TRAINED = "\033[2m", "\033[30;48;5;120m"
BY_LOSS = [
    (0.1, "\033[30;48;5;157m"),
    (0.5, "\033[30;48;5;192m"),
    (1.0, "\033[30;48;5;228m"),
    (2.0, "\033[30;48;5;222m"),
    (4.0, "\033[30;48;5;215m"),
    (float("inf"), "\033[97;48;5;160m"),
]
# By Context Relevance: repeats what was said, follows from it, hardly does, does not.
BY_RELEVANCE = [
    (0.1, "\033[97;48;5;27m"),
    (0.9, "\033[30;48;5;157m"),
    (1.0, "\033[30;48;5;228m"),
    (float("inf"), "\033[97;48;5;160m"),
]
RESET, BOLD = "\033[0m", "\033[1m"


def lines(views: list, colour: bool) -> list[str]:
    """One line for each row, segment and turn; a turn's line starts with its role and positions.
    Without colour, what is trained stands between ⟦ and ⟧."""
    out = [_legend(views, colour)]
    for view in views:
        out += ["", _bold(f"=== {view.title}", colour)]
        for segment in view.segments:
            out.append(f"--- {segment.title}")
            for i, (role, tokens) in enumerate(segment.turns):
                where = f"{tokens[0].position}-{tokens[-1].position}"
                if i in segment.relevance:
                    where += f" {_cr(segment.relevance[i], colour)}"
                text = _coloured(tokens) if colour else _marked(tokens)
                out.append(f"  {role:<12} {where:>9}  {text}")
    return out


def _cr(value: float, colour: bool) -> str:
    text = f"CR {value:.2f}"
    code = next(code for top, code in BY_RELEVANCE if value <= top)
    return f"{code}{text}{RESET}" if colour else text


def visible(text: str) -> str:
    """A token's text with its line ends drawn; they would break the line."""
    return text.replace("\n", "⏎").replace("\r", "␍").replace("\t", "⇥")


def _legend(views: list, colour: bool) -> str:
    if not colour:
        return "⟦trained⟧, all else is context; positions restart with each segment"
    if not any(has_loss(view) for view in views):
        return f"{TRAINED}trained{RESET}, {PLAIN}all else is context{RESET}"
    steps = [f"{code}{'over 4' if top > 4 else f'to {top}'}{RESET}" for top, code in BY_LOSS]
    return f"loss of trained tokens (nats): {' '.join(steps)}, {PLAIN}all else is context{RESET}"


def has_loss(view) -> bool:
    return any(
        token.loss is not None for s in view.segments for _, turn in s.turns for token in turn
    )


def _coloured(tokens: list) -> str:
    return "".join(f"{_code(token)}{visible(token.text)}{RESET}" for token in tokens)


def _code(token) -> str:
    if not token.trained:
        return PLAIN
    if token.loss is None:
        return TRAINED
    return next(code for top, code in BY_LOSS if token.loss <= top or top == float("inf"))


def _marked(tokens: list) -> str:
    text, inside = "", False
    for token in tokens:
        if token.trained != inside:
            text += "⟦" if token.trained else "⟧"
            inside = token.trained
        text += visible(token.text)
    return text + "⟧" * inside


def _bold(text: str, colour: bool) -> str:
    return f"{BOLD}{text}{RESET}" if colour else text
