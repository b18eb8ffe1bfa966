"""The right name for a wrong one."""

from difflib import get_close_matches


def nearest(word: str, choices: list[str], cutoff: float = 0.5) -> str:
    """', did you mean X?', or nothing where no choice is like `word`."""
    found = get_close_matches(word, choices, n=1, cutoff=cutoff)
    return f", did you mean {found[0]}?" if found else ""


def keys_of(tree: dict[str, object], prefix: str = "") -> list[str]:
    """Every key of a nested dict, dotted: `lr`, `optimizer`, `optimizer.lr`, `stage.photo`, ..."""
    keys = []
    for key, value in tree.items():
        keys.append(f"{prefix}{key}")
        if isinstance(value, dict):
            keys += keys_of(value, f"{prefix}{key}.")
    return keys


def unknown_key(key: str, known: list[str], of_stages: dict[str, list[str]]) -> str:
    """The sentence for a key that is none of `known`: it offers a neighbour of nearly that name, else one of elsewhere.

    `of_stages` has the keys of each stage, for one that belongs to another stage than the chosen."""
    parent, _, leaf = key.rpartition(".")
    neighbours = {_leaf(k): k for k in known if k.rpartition(".")[0] == parent}
    others = {k: f"stage.{k} of stage={name}" for name, keys in of_stages.items() for k in keys if parent == "stage"}
    elsewhere = {_leaf(k): k for k in reversed(known)}  # of equal leaves the first key wins
    for keys, cutoff in ((neighbours, 0.6), (others, 0.7), (elsewhere, 0.7)):
        close = get_close_matches(leaf, keys, n=1, cutoff=cutoff)
        if close:
            return f"{key}: no such key, did you mean {keys[close[0]]}?"
    there = f"{parent} has {', '.join(neighbours)}" if parent and neighbours else "--cfg job shows all keys"
    return f"{key}: no such key; {there}"


def _leaf(key: str) -> str:
    return key.rpartition(".")[2]
