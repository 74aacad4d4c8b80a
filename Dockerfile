# docker build -t posttrain .                              for the CPU
# docker build -t posttrain --build-arg TORCH=cu128 .      for NVIDIA's GPUs: docker run --gpus all ...
# docker run --rm -v "$PWD:/work" posttrain                runs quickstart into ./runs; any command's words may follow
FROM python:3.11-slim

# cpu, or a version of CUDA as in https://download.pytorch.org/whl
ARG TORCH=cpu

RUN useradd --create-home --uid 1000 posttrain && mkdir /work && chown posttrain /work
WORKDIR /src
COPY constraints.txt ./
RUN pip install --no-cache-dir --constraint constraints.txt "torch==2.13.0+${TORCH}" \
    --extra-index-url "https://download.pytorch.org/whl/${TORCH}"
COPY pyproject.toml README.md LICENSE ./
COPY posttrain posttrain
COPY plugins plugins
COPY conf conf
COPY recipes recipes
RUN pip install --no-cache-dir --constraint constraints.txt .

USER posttrain
WORKDIR /work
ENTRYPOINT ["posttrain"]
CMD ["recipe=quickstart"]
