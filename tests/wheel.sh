#!/bin/sh
# Builds the wheel, installs it into an empty environment outside the checkout, and runs the quick demo from there.
set -eu
python=$(realpath -s "${PYTHON:-python3}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT INT TERM
"$python" -m build --quiet --wheel --outdir "$work/dist" .
"$python" -m venv "$work/env"
pip="$work/env/bin/python -m pip --disable-pip-version-check install --quiet"
$pip "${TORCH:-torch}"
wheel=$(ls "$work"/dist/*.whl)
$pip "$wheel[demo]"
cd "$work"
"$work/env/bin/ciphertune" backends
"$work/env/bin/ciphertune" plugins
"$work/env/bin/ciphertune" demo --quick --output "$work/out" --json > "$work/result.json"
"$work/env/bin/python" - "$work/result.json" <<'EOF'
import json, pathlib, sys
result = json.loads(pathlib.Path(sys.argv[1]).read_text())
assert result["to"].startswith("mlwe"), result
assert result["traffic"]["requests"] > 0, result
print("the wheel runs the demo:", {k: result[k] for k in ("to", "model")})
EOF
