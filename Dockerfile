# docker build --target device -t pocketvlm:device .   what answers: the runtime and onnxruntime, no torch
# docker build --target server -t pocketvlm:server .   what distils and exports; on a GPU: docker run --gpus all
FROM python:3.11-slim-bookworm AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE pocketvlm.py ./
COPY distill distill
COPY export export
COPY evals evals
COPY runtime runtime
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .
COPY constraints.txt /wheels/constraints.txt

FROM python:3.11-slim-bookworm AS base
ENV PYTHONUNBUFFERED=1 OMP_WAIT_POLICY=PASSIVE
# The base image has no compiled standard library, and the user cannot write one: each start would compile it anew.
RUN useradd --create-home pocketvlm && python -m compileall -q -x site-packages /usr/local/lib/python3.11

FROM base AS server
COPY --from=wheel /wheels /wheels
RUN pip install --no-cache-dir -c /wheels/constraints.txt "$(ls /wheels/*.whl)[distill,export,onnx,report]"
# torch's wheel brings its CUDA libraries; these ask the NVIDIA container runtime for the driver.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER pocketvlm
WORKDIR /home/pocketvlm
ENTRYPOINT ["pocketvlm"]
CMD ["--help"]

# Installed in a stage of its own: neither the wheel nor what pip leaves behind gets into the image.
FROM wheel AS device-venv
RUN python -m venv --without-pip /usr/local/pocketvlm \
 && pip --python /usr/local/pocketvlm/bin/python install --no-cache-dir -c /wheels/constraints.txt \
    "$(ls /wheels/*.whl)[onnx]"

FROM base AS device
COPY --from=device-venv /usr/local/pocketvlm /usr/local/pocketvlm
ENV PATH=/usr/local/pocketvlm/bin:$PATH
USER pocketvlm
WORKDIR /home/pocketvlm
ENTRYPOINT ["pocketvlm"]
CMD ["--help"]
