# docker build --target device -t pocketvlm:device .   what answers: the runtime and onnxruntime, no torch
# docker build --target server -t pocketvlm:server .   what distils and exports; on a GPU: docker run --gpus all
FROM python:3.11-slim AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE pocketvlm.py ./
COPY distill distill
COPY export export
COPY evals evals
COPY runtime runtime
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.11-slim AS base
ENV PYTHONUNBUFFERED=1 OMP_WAIT_POLICY=PASSIVE
COPY constraints.txt /wheels/constraints.txt
COPY --from=wheel /wheels /wheels
RUN useradd --create-home pocketvlm

FROM base AS server
RUN pip install --no-cache-dir -c /wheels/constraints.txt "$(ls /wheels/*.whl)[distill,export,onnx,report]"
# torch's wheel brings its CUDA libraries; these ask the NVIDIA container runtime for the driver.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER pocketvlm
WORKDIR /home/pocketvlm
ENTRYPOINT ["pocketvlm"]
CMD ["--help"]

FROM base AS device
RUN pip install --no-cache-dir -c /wheels/constraints.txt "$(ls /wheels/*.whl)[onnx]"
USER pocketvlm
WORKDIR /home/pocketvlm
ENTRYPOINT ["pocketvlm"]
CMD ["--help"]
