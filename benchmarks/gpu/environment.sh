# Makes this project importable on a machine with a GPU that lacks its packages. Source it in the repository's folder:
#
#     . benchmarks/gpu/environment.sh
#     python3 -m benchmarks.gpu.run --out results
#
# It installs the wheels of .gpu (benchmarks/gpu/pack.py) into $MOBILEMOE_SITE, by default a folder among the temporary
# files, and puts that folder, the files for torch 2.11 and this repository on PYTHONPATH. Nothing else is changed.
MOBILEMOE_SITE="${MOBILEMOE_SITE:-${TMPDIR:-/tmp}/mobilemoe-site}"
if [ ! -d .gpu/wheels ]; then
    echo "environment.sh: .gpu/wheels is not here; run python -m benchmarks.gpu.pack where there is a network" >&2
    return 1
fi
python3 -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --disable-pip-version-check \
    --upgrade --target "$MOBILEMOE_SITE" .gpu/wheels/*.whl || return 1
export PYTHONPATH="$PWD/.gpu/site:$MOBILEMOE_SITE:$PWD${PYTHONPATH:+:$PYTHONPATH}"
