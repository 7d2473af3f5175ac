#!/usr/bin/env bash
# The newcomer's first hour: a fresh clone and a fresh environment, the commands of the README, an own
# folder of images, every command of the command line, a notebook, the docs, the tests.
#
#   benchmarks/newcomer.sh                     all steps, in a temporary folder
#   benchmarks/newcomer.sh own_folder cli      these alone
#   PYTHON=venv/bin/python benchmarks/newcomer.sh own_folder cli    in an environment that exists
#
# Each step's seconds and exit code are printed; the exit code is the number of steps that failed.
# WORK names the folder to work in (default: a temporary one), SOURCE the repository that is cloned
# (default: this one).
set -uo pipefail

STEPS=(clone environment plain own_folder report demo cli python notebook docs tests)
SOURCE=${SOURCE:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
WORK=${WORK:-$(mktemp -d)}
CLONE=$WORK/sktransfer
mkdir -p "$WORK"

if [[ -n ${PYTHON:-} ]]; then # an environment that exists: the source as it is
    CLONE=$SOURCE
    PYTHON=$(cd "$(dirname "$PYTHON")" && pwd)/$(basename "$PYTHON")
    export PYTHONPATH=$SOURCE${PYTHONPATH:+:$PYTHONPATH}
else
    PYTHON=$WORK/venv/bin/python
fi
export PATH=$(dirname "$PYTHON"):$PATH
sktransfer() { "$PYTHON" -m sktransfer "$@"; }
install() { # into the fresh environment alone
    [[ $CLONE == "$SOURCE" ]] || "$PYTHON" -m pip install --quiet "$@"
}

# ------------------------------------------------------------------------------ steps

clone() { git clone --quiet "$SOURCE" "$CLONE"; }

environment() { python3 -m venv "$WORK/venv" && "$PYTHON" -m pip --version; }

plain() { # the README's first command, without any extra
    cd "$CLONE" && install .
}

report() { # its second command, on the own folder
    cd "$WORK" && sktransfer benchmark photos/ --output report/ --skip-unreadable
}

demo() { # the main job, on the solar cells
    cd "$CLONE" && install ".[demo]" && cd "$WORK" && sktransfer benchmark
}

tests() { # the README's command for the tests
    cd "$CLONE" && install -e ".[test]" &&
        "$PYTHON" -m pytest -n 2 --dist worksteal
}

own_folder() { # crops of photographs, drawings, half of which are cut out, and what is in the way
    cd "$WORK" && "$PYTHON" - "$WORK/photos" <<'PYTHON'
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from sklearn.datasets import load_sample_images

root, chance = Path(sys.argv[1]), np.random.default_rng(0)


def save(image, label, number, suffix):
    (root / label).mkdir(parents=True, exist_ok=True)
    image.save(root / label / f"{number:02}.{suffix}")


for name, photo in zip(("china", "flower"), load_sample_images().images, strict=True):
    for number in range(24):
        x, y, size = *chance.integers(0, 220, 2), chance.integers(80, 200)
        save(Image.fromarray(photo[y : y + size, x : x + size]), name, number, "jpg")
for name, corners in (("triangle", 3), ("square", 4)):
    for number in range(24):
        image = Image.new("RGBA", (160, 160), (0, 0, 0, 0) if number % 2 else (255, 255, 255, 255))
        circle = (*map(int, chance.integers(60, 100, 2)), int(chance.integers(20, 55)))
        color = tuple(map(int, chance.integers(0, 200, 3)))
        angle = int(chance.integers(0, 360))
        ImageDraw.Draw(image).regular_polygon(circle, corners, angle, fill=color)
        save(image, name, number, "png")
whole = (root / "china" / "00.jpg").read_bytes()
(root / "china" / "damaged.jpg").write_bytes(whole[: len(whole) // 3])
(root / "beside.jpg").write_bytes(whole)
(root / "empty").mkdir()
for name in (".DS_Store", "flower/Thumbs.db", "flower/notes.txt"):
    (root / name).touch()
print(sum(1 for _ in root.rglob("*.*")), "files in", root)
PYTHON
}

cli() { # every command; each is tried, and those that fail are counted
    (cd "$CLONE" && install ".[demo,onnx,openvino]") # of `export`
    cd "$WORK" && local failed=0 skip=--skip-unreadable
    each() {
        local start=$SECONDS code=0
        sktransfer "$@" >"$WORK/cli.out" 2>"$WORK/cli.err" || code=$?
        printf '  %4d s, exit %d: sktransfer %s\n' $((SECONDS - start)) $code "$*"
        ((code == 0)) || { failed=$((failed + 1)) && tail -n 3 "$WORK/cli.err"; }
    }
    each audit photos --output audit --memory cache
    each fit photos -o model.skops --memory cache $skip
    each predict model.skops photos $skip
    each predict model.skops photos/china --json $skip
    each export model.skops -o model.onnx
    each export model.skops -o model.xml
    each embed photos -o rows.csv --memory cache $skip
    each similar photos photos/china/00.jpg --html similar.html --memory cache $skip
    each rank photos --backbone efficientnet_lite0 --memory cache $skip
    each classify photos/china/00.jpg -k 3
    each benchmark photos --splits 2 --memory cache --output report --save-best best.skops $skip
    each predict best.skops photos --csv $skip
    each cache info cache
    each cache clear cache
    return $failed
}

python() { # ten lines of Python, as in the README
    cd "$WORK" && "$PYTHON" - <<'PYTHON'
from sklearn.model_selection import cross_val_score

from sktransfer import load_image_folder, make_classifier

data = load_image_folder("photos/", errors="skip")
scores = cross_val_score(make_classifier(memory="cache"), data.data, data.target)
print(f"accuracy {scores.mean():.3f}")
PYTHON
}

notebook() { # a real one or, where its runner can't be installed, a session of IPython
    cd "$WORK" && { install nbclient ipykernel || install ipython; } && "$PYTHON" - <<'PYTHON'
cells = [
    "from sktransfer import PretrainedFeatureExtractor, load_image_folder, make_classifier",
    "data = load_image_folder('photos/', errors='skip')",
    "model = make_classifier(verbose=1).fit(data.data, data.target)\nmodel",
    "model.predict(data.data[:3])",
]
try:
    import ipykernel  # noqa: F401
    import nbformat
    from nbclient import NotebookClient
except ImportError:
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell.instance()
    for cell in cells:
        shell.run_cell(cell).raise_error()
    print("a session of IPython")
else:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, timeout=600).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    print(len(outputs), "outputs,", sum(o.get("name") == "stderr" for o in outputs), "of stderr")
PYTHON
}

docs() {
    cd "$CLONE" && install ".[docs]" &&
        "$PYTHON" -m sphinx -W -q -b html docs "$WORK/html"
}

# ------------------------------------------------------------------------------ all of them

chosen=("$@")
((${#chosen[@]})) || chosen=("${STEPS[@]}")
for step in "${chosen[@]}"; do
    [[ " ${STEPS[*]} " == *" $step "* ]] || { echo "no step $step; steps: ${STEPS[*]}" >&2 && exit 64; }
done
failed=0
echo "in $WORK, with $PYTHON"
for step in "${chosen[@]}"; do
    start=$SECONDS code=0
    ("$step") >"$WORK/$step.log" 2>&1 || code=$?
    ((code == 0)) || failed=$((failed + 1))
    printf '%-12s %5d s, exit %d\n' "$step" $((SECONDS - start)) $code
    if [[ $step == cli ]]; then cat "$WORK/$step.log"; elif ((code)); then tail -n 5 "$WORK/$step.log"; fi
done
exit $failed
