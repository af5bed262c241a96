"""Take out of the notebooks' outputs what is of this machine alone.

Temporary folders go, the home folder is `~`, and warnings of installed libraries go, with the folder they name.
"""
import json
import re
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEMPORARY = re.compile(re.escape(tempfile.gettempdir()) + r"/tmp\w+/?")
WARNING = re.compile(r"^\S*/site-packages/\S+: \w+Warning: .*\n(?:[ \t]+.*\n?)?|^[WIE]\d{4} .*\n?", re.M)


def neutral(text: str) -> str:
    "Text of an output without folders of this machine."
    return TEMPORARY.sub("", text).replace(f"{Path.home()}/", "~/")


def clean(value):
    "An output, or a part of it, with all its text neutral."
    if isinstance(value, str): return neutral(value)
    if isinstance(value, list): return [clean(part) for part in value]
    if isinstance(value, dict):
        return {key: part if key.startswith("image/") else clean(part) for key, part in value.items()}
    return value


def without_warnings(outputs: list[dict]) -> list[dict]:
    "Outputs without warnings of libraries; an output of nothing else goes."
    kept = []
    for output in outputs:
        if output.get("name") != "stderr":
            kept.append(output)
            continue
        text = WARNING.sub("", "".join(output["text"]))
        if text: kept.append(output | dict(text=text.splitlines(keepends=True)))
    return kept


def main():
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        text = path.read_text(encoding="utf-8")
        notebook = json.loads(text)
        for cell in notebook["cells"]:
            if "outputs" in cell: cell["outputs"] = without_warnings(clean(cell["outputs"]))
        new = json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
        if json.loads(new) != json.loads(text): path.write_text(new, encoding="utf-8")


if __name__ == "__main__": main()
