"""Names of tokens that a tokenizer has no pieces for, such as those of pictures and sounds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path


def name_tokens(folder: Path, names: Mapping[int, str], count: int) -> None:
    """Give tokens of tokenizer.json in `folder` their `names`, by id, so that it has `count`.

    Those between that are in no one's way get names too, or `tokenizers` would move the ones behind.
    """
    file = folder / "tokenizer.json"
    table = json.loads(file.read_text(encoding="utf-8"))
    added = {token["id"]: token for token in table["added_tokens"]}
    first = 1 + max(table["model"]["vocab"].values())
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    for token in range(first, count):
        added.setdefault(token, {"id": token, "content": f"<unused{token}>", **plain})
    for token, name in names.items():
        added[token]["content"] = name
    table["added_tokens"] = [*added.values()]
    file.write_text(json.dumps(table, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
