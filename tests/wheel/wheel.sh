#!/bin/sh
# Installs the newest wheel of dist/ into an empty environment outside the checkout, and runs from there the quick demo,
# the plugins that are distributions of their own, and the pages that make plugins step by step. No compiler is in reach
# of the demo, and it uses the compiled loops.
set -eu
root=$(realpath -s .)
python=$(realpath -s "${PYTHON:-python3}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT INT TERM
"$python" -m venv "$work/env"
export PATH="$work/env/bin:$PATH" PIP_DISABLE_PIP_VERSION_CHECK=1
export MYPY_CACHE_DIR="$work/mypy"
unset PYTHONPATH
constraints=${CONSTRAINTS:-}  # options of pip
# shellcheck disable=SC2086
install() { pip install -qq --no-compile $constraints "$@"; }
install "${TORCH:-torch}"
wheel=$(ls -t "$root"/dist/*.whl | head -n 1)
install "$wheel[demo,testing]"
cd "$work"
ciphertune backends
ciphertune plugins
if (PATH="$work/env/bin"; command -v cc || command -v gcc || command -v clang); then exit 1; fi
env -u CC PATH="$work/env/bin" ciphertune demo --quick --output "$work/out" --json > "$work/result.json"
env -u CC PATH="$work/env/bin" python - <<'PYTHON'
from ciphertune_mlwe import native
found = native.library()
assert found is not None, "the wheel has no compiled loops"
print("compiled products in the wheel:", ", ".join(native.products(found)))
PYTHON
python - "$work/result.json" <<'PYTHON'
import json, pathlib, sys
result = json.loads(pathlib.Path(sys.argv[1]).read_text())
assert result["to"].startswith("mlwe"), result
assert result["traffic"]["requests"] > 0, result
print("the wheel runs the demo:", {k: result[k] for k in ("to", "model")})
PYTHON

echo "Plugins from their own folders"
install mypy "$root/plugins/ciphertune-http[test]" "$root/plugins/ciphertune-ckks[test]" "$root/plugins/ciphertune-slalom[test]"
for plugin in http ckks slalom; do
    cp -r "$root/plugins/ciphertune-$plugin" "$work/$plugin"
    (cd "$work/$plugin" && rm -r "ciphertune_$plugin" && python -m pytest --quiet)
done
# At once, and as strictly as each asks for. Most of the time went to transformers, which no plugin calls.
cat > "$work/mypy.ini" <<'INI'
[mypy]
strict = True
warn_unreachable = True
[mypy-gguf.*,huggingface_hub.*,matplotlib.*,peft.*,transformers.*]
follow_imports = skip
ignore_missing_imports = True
# A single module beside its stub, which mypy does not look for.
[mypy-seal]
ignore_missing_imports = True
INI
(cd "$root/plugins" && mypy --config-file "$work/mypy.ini" ciphertune-*/ciphertune_*)
ciphertune demo --quick --steps 20 --to mlwe+https:// --output "$work/out" > /dev/null
echo "the demo trains through mlwe+https"

for page in write-a-transport write-a-backend write-a-plugin; do
    echo "Following docs/$page.md"
    mkdir "$work/$page"
    python "$root/tests/wheel/follow.py" "$root/docs/$page.md" > "$work/$page.sh"
    (cd "$work/$page" && bash -eu "$work/$page.sh" > "$work/$page.log" 2>&1) || { tail -n 60 "$work/$page.log"; exit 1; }
done
echo "the pages make plugins that pass their suites and train"
