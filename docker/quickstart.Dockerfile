# The quickstart on a CPU, both stages in one image.
#   docker build -f docker/quickstart.Dockerfile -t distily-cache:quickstart .
#   docker run -v "$PWD/run:/opt/distily-cache/run" distily-cache:quickstart
FROM python:3.11-slim
RUN apt-get update && apt-get install -y --no-install-recommends gcc g++ make libnuma1 \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/distily-cache
COPY . .
RUN make .venv/.ready ACCELERATOR=cpu
CMD ["make", "quickstart"]
