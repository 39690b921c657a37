# Stage 2 on NVIDIA GPUs: CUDA PyTorch, no vLLM.
#   docker build -f docker/train.Dockerfile -t distily-cache:train .
#   docker run --gpus all -v "$PWD/data:/data" distily-cache:train \
#     from-cache /data/cache --output-dir /data/student --student-model-as-bitnet --bf16
FROM pytorch/pytorch:2.13.0-cuda13.0-cudnn9-runtime
RUN apt-get update && apt-get install -y --no-install-recommends gcc g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/distily-cache
COPY . .
RUN pip install --no-cache-dir '.[train,s3]' bitsandbytes
WORKDIR /data
ENTRYPOINT ["distily-train"]
