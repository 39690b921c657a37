# Stage 1 on NVIDIA GPUs: vLLM's own image plus distily-cache.
#   docker build -f docker/generate.Dockerfile -t distily-cache:generate .
#   docker run --gpus all -v "$PWD/data:/data" distily-cache:generate \
#     generate Qwen/Qwen3-8B /data/corpus.jsonl --out /data/cache
FROM vllm/vllm-openai:v0.32.0
WORKDIR /opt/distily-cache
COPY . .
# vLLM's torch and transformers stay as the image has them.
RUN pip install --no-cache-dir --no-deps . \
 && pip install --no-cache-dir blake3 datasets obstore pyarrow rich safetensors typer xxhash 'zarr>=3.1.2'
WORKDIR /data
ENTRYPOINT ["distily-cache"]
