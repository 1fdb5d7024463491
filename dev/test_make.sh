#!/usr/bin/env bash
# The build itself and the machine it finds: which GPUs count, what is rebuilt, which libraries are linked, what a
# container grants. Compilers and nvidia-smi are scripts here, so nothing is compiled; the last parts run
# ./train_goldfinch (or the program named as the first argument). Closing line: N passed, N failed.
set -u
export LC_ALL=C
unset MAKEFLAGS MAKELEVEL MFLAGS GPU PRECISION
program=$(realpath "${1:-./train_goldfinch}")
project=$(realpath "$(dirname "${BASH_SOURCE[0]}")/..")
tmp=$(mktemp -d "${TMPDIR:-/tmp}/goldfinch_make.XXXXXX")
trap 'rm -rf "$tmp"' EXIT
mkdir "$tmp/tree" "$tmp/bin" && cp -r "$project"/{Makefile,*.cu,*.c,dev} "$tmp/tree" && cd "$tmp/tree" || exit 1
passed=0 failed=0
check() {                                               # check DESCRIPTION CODE: counts, and shows the last output if CODE is not 0
    if [ "$2" = 0 ]; then passed=$((passed + 1)); echo "PASS $1"
    else failed=$((failed + 1)); echo "FAIL $1"; sed 's/^/     | /' "$tmp/out.txt" "$tmp/err.txt" 2>/dev/null | cut -c1-300 | tail -n 12; fi
}
stub() { printf '#!/bin/sh\n%s\n' "$2" >"$1"; chmod +x "$1"; }             # stub FILE COMMANDS: a program that does this
build() { PATH="$tmp/bin:$PATH" make "$@" >"$tmp/out.txt" 2>"$tmp/err.txt"; }
says() { grep -qE -e "$1" "$tmp/out.txt"; }
# compilers that write down how they were called and leave an empty file
for name in nvcc cxx cc; do stub "$tmp/bin/$name" "echo $name \"\$@\" >>'$tmp/calls.txt'
while [ \$# -gt 0 ]; do [ \"\$1\" = -o ] && : >\"\$2\"; shift; done"; done
stubs="CXX=$tmp/bin/cxx CC=$tmp/bin/cc"
calls() { : >"$tmp/calls.txt"; build "$@" && cat "$tmp/calls.txt" >>"$tmp/out.txt"; }

echo "-- which GPUs count"
answers() {                                             # answers PATTERN TEXT: what is built where nvidia-smi says TEXT
    stub "$tmp/bin/nvidia-smi" "printf '$2'"
    build -n train && says "$1"; check "nvidia-smi says \"$2\": $1" $?
}
answers 'GPU build, BF16, sm 90( with NCCL)?: nvcc and a GPU are here \(GPU' '9.0\n9.0\n'
answers 'GPU build, BF16, sm 86( with NCCL)?: .*sm_61 beside it: older than sm_80' '6.1\n8.6\n'
answers 'GPU build, BF16, sm 80 120( with NCCL)?: ' '12.0\n 8.0\r\n'
answers 'CPU build, FP32: the GPU here is sm_75, older than sm_80' '7.5\n'
answers 'CPU build, FP32: .* finds no GPU' ''
answers 'CPU build, FP32: .* is no number' 'Field compute_cap is not a valid field to query.\n'
answers 'GPU build, BF16, sm 90( with NCCL)?: ' '[N/A]\n9.0\n'
build -n GPU=1 GPU_ARCH="120 80" train
says 'arch=compute_80,code=sm_80 .*arch=compute_120,code=compute_120 ' && ! says 'code=compute_80'
check "a GPU build has machine code for each architecture, and PTX of the newest" $?
build -n GPU=1 GPU_ARCH=90 train && says 'code=sm_90a ' && ! says 'code=compute_'; check "for one architecture, no PTX" $?

echo "-- what is rebuilt"
calls GPU=0 $stubs train && says '^cxx .*-march=native.* -c '; check "a first build compiles" $?
calls GPU=0 $stubs train && ! says '^cxx '; check "a second one does not" $?
calls GPU=0 $stubs OPTIMIZE=-O2 train && says '^cxx -O2 .* -c '; check "with OPTIMIZE=-O2 all is compiled anew" $?
calls GPU=0 $stubs train && says '^cxx -O3 .* -c '; check "and without it again" $?
calls GPU=0 $stubs MARCH= train && says '^cxx .* -c ' && ! says march; check "MARCH= names no instructions" $?
calls GPU=0 $stubs train && ! says '^cxx '; check "and has its own folder" $?
calls GPU=0 $stubs dev/adamw
depends=$(sed -nE 's/^cxx (.*) -MMD -c (.*adamw[.]cu[.]cpp) .*/\1 -MM \2/p' "$tmp/calls.txt")
g++ $depends >"$tmp/out.txt" 2>"$tmp/err.txt" && says ' build/cpp/train_goldfinch[.]cu[.]cpp' && ! says '[.][.]/'
check "a file that two programs include has one name, so it is written once" $?

echo "-- the programs at the top"
first=build/cpu-FP32-cxx/train_goldfinch
[ train_goldfinch -ef $first ]; check "a program at the top is the one in build/" $?
stub "$tmp/bin/ln" 'echo "ln: Operation not permitted" >&2; exit 1'
echo first >$first; calls GPU=0 $stubs train && [ "$(cat train_goldfinch)" = first ] && [ ! -s "$tmp/err.txt" ]
check "where no second name is allowed, it is a copy" $?
rm "$tmp/bin/ln"; calls GPU=0 $stubs train; stub "$tmp/bin/ln" 'exit 1'
calls GPU=0 $stubs PRECISION=BF16 train; [ "$(cat $first)" = first ]; check "a copy leaves the other build as it is" $?
rm "$tmp/bin/ln"

echo "-- a toolkit in a folder"
mkdir -p "$tmp/cuda/bin" "$tmp/cuda/lib"
build -n GPU=1 GPU_ARCH=90 CUDA="$tmp/cuda"; [ $? = 2 ] && grep -q 'expected bin/nvcc in this folder' "$tmp/err.txt"
check "CUDA=FOLDER without a compiler is refused" $?
stub "$tmp/cuda/bin/nvcc" ''
build -n GPU=1 GPU_ARCH=90 CUDA="$tmp/cuda"; [ $? = 2 ] && grep -q 'expected libcublas.so in its lib/' "$tmp/err.txt"
check "and without cuBLAS" $?
touch "$tmp/cuda/lib/libcublas.so.13" "$tmp/cuda/lib/libcublasLt.so.13"
build -n GPU=1 GPU_ARCH=90 CUDA="$tmp/cuda"
says "$tmp/cuda/bin/nvcc .*-L$tmp/cuda/lib .*-rpath=$tmp/cuda/lib .*-l:libcublas.so.13 -l:libcublasLt.so.13"
check "one with libcublas.so.13 alone, as of pip's packages, is linked by that name" $?
touch "$tmp/cuda/lib/libcublas.so" "$tmp/cuda/lib/libcublasLt.so"
build -n GPU=1 GPU_ARCH=90 CUDA="$tmp/cuda" && says '-l:libcublas.so -l:libcublasLt.so'; check "libcublas.so comes first" $?

echo "-- the program elsewhere"
mkdir -p build/x && cp "$program" build/x/ && ln -s "$PWD/build/x/train_goldfinch" "$tmp/link"
(cd "$tmp" && ./link --train.max_steps 1 --train.sample_every -1 >out.txt 2>err.txt); check "through a symbolic link into build/ the demo finds its text" $?
cp "$program" "$tmp/alone"; (cd "$tmp" && mkdir -p a/b/c && mv alone a/b/c && a/b/c/alone >out.txt 2>err.txt)
[ $? = 2 ] && grep -q "the project's source text is not in the program's folder" "$tmp/err.txt"; check "and alone it says what is missing" $?

if ldd "$program" | grep -q libcublas; then
    echo "-- a container: not looked at by a GPU build"
elif ! unshare -rm true 2>/dev/null; then
    echo "-- a container: unshare -rm is not allowed here"
else
    echo "-- a container"
    model="--model.n_layer 2 --model.n_embd 64 --model.ctx_len 32 --model.vocab_size 264 --model.tmix x060 --model.tmix2 '' \
        --train.data_type utf-8 --train.data_file $project/Makefile --train.micro_bsz 32 --train.sample_every -1 --train.val_every 0"
    contained() {                                       # contained COMMAND: under the groups in $tmp/groups
        unshare -rm sh -c "mount --bind '$tmp/groups' /sys/fs/cgroup && cd '$tmp' && $1" >"$tmp/out.txt" 2>"$tmp/err.txt"
    }
    group() { mkdir -p "$(dirname "$tmp/groups/$1")"; printf "$2" >"$tmp/groups/$1"; }           # group FILE TEXT
    mkdir -p "$tmp/groups"
    group memory.max '50000000\n'; group memory.current '40000000\n'; group memory.stat 'anon 1\ninactive_file 5000000\nactive_file 6000000\n'
    contained "'$program' $model --train.max_steps 1 --train.out m --model.n_embd 512"
    [ $? = 2 ] && grep -q 'CPU has 0.02 GiB free' "$tmp/err.txt"
    check "memory.max, less what is used, files not counted" $?
    rm -rf "$tmp/groups"/*
    if grep -q ':memory:' /proc/self/cgroup; then       # version 1
        group memory/memory.limit_in_bytes '50000000\n'; group memory/memory.usage_in_bytes '20000000\n'
        contained "'$program' $model --train.max_steps 1 --train.out m --model.n_embd 512"
        [ $? = 2 ] && grep -q 'CPU has 0.03 GiB free' "$tmp/err.txt"; check "memory.limit_in_bytes" $?
        rm -rf "$tmp/groups"/*
    fi
    threads() {                                         # OS threads that compute
        contained "unset OMP_NUM_THREADS; '$program' $model --train.out t --train.max_steps 100000 & pid=\$!
            while kill -0 \$pid && ! grep -qs '^1,' t/log.csv; do sleep 0.05; done; ls /proc/\$pid/task | wc -l >threads.txt; kill -9 \$pid"
        cat "$tmp/threads.txt"; rm -rf "$tmp/t"
    }
    all=$(threads)
    group cpu.max '100000 100000\n'; one=$(threads)
    group cpu.max 'max 100000\n'; [ "$(threads)" = "$all" ]; check "cpu.max: no limit, $all threads in all" $?
    [ "$one" = $((all - $(nproc) + 1)) ]; check "one CPU: $one of these" $?
fi

echo "$passed passed, $failed failed"
[ $failed = 0 ]
