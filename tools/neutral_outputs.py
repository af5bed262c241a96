"Take a machine's own folders out of the notebooks' outputs: temporary ones go, the home folder is `~`."
import json
import re
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEMPORARY = re.compile(re.escape(tempfile.gettempdir()) + r"/tmp\w+/?")


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


def main():
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        text = path.read_text(encoding="utf-8")
        notebook = json.loads(text)
        for cell in notebook["cells"]:
            if "outputs" in cell: cell["outputs"] = clean(cell["outputs"])
        new = json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
        if json.loads(new) != json.loads(text): path.write_text(new, encoding="utf-8")


if __name__ == "__main__": main()
