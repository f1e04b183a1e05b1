# For nodes with NVIDIA GPUs: docker build -t mmscale . && docker run --gpus all --ipc=host mmscale plan demo
# torch's wheel brings the CUDA libraries; the node brings its driver (nvidia-container-toolkit).
FROM python:3.11-slim

# Triton and DeepSpeed compile small sources on their first use.
RUN apt-get update && apt-get install -y --no-install-recommends build-essential \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/mmscale
COPY pyproject.toml README.md LICENSE ./
COPY mmscale mmscale
COPY ds_configs ds_configs
COPY shards/*.yaml shards/
COPY slurm slurm
COPY tools/constraints.txt tools/
RUN pip install --no-cache-dir -c tools/constraints.txt ".[deepspeed,adapters,sentence-transformers,wandb,onnx,maps,sweep]"

# Runs, shards and the caches of weights are mounted here.
WORKDIR /workspace
ENV HF_HOME=/workspace/.cache/huggingface
ENTRYPOINT ["mmscale"]
