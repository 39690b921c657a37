# Stage 1 on NVIDIA GPUs (driver 580 or newer): vLLM and distily-cache in the versions of requirements/cuda.lock.
#   docker build -f docker/generate.Dockerfile -t distily-cache:generate .
#   docker run --gpus all -v "$PWD/data:/data" distily-cache:generate \
#     generate Qwen/Qwen3-8B /data/corpus.jsonl --out /data/cache
FROM python:3.11-slim
# The NVIDIA container runtime refuses to start this behind a driver that is too old for CUDA 13.
ENV NVIDIA_REQUIRE_CUDA="cuda>=13.0" NVIDIA_DRIVER_CAPABILITIES=compute,utility
# Triton compiles its launchers.
RUN apt-get update && apt-get install -y --no-install-recommends gcc g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/distily-cache
COPY . .
RUN pip install --no-cache-dir -c requirements/cuda.lock '.[generate,s3]'
WORKDIR /data
ENTRYPOINT ["distily-cache"]
