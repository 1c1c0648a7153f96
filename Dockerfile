# Everything that the steps need, on top of an image with or without torch. docker-compose.yml mounts the checkout over
# the code, so only new requirements ask for a new build.
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:26.07-py3
FROM ${BASE_IMAGE}

# A base image with a torch of its own keeps it: NVIDIA's is built for its GPUs and pinned by PIP_CONSTRAINT.
ARG TORCH_VERSION=2.13.0
ARG TORCH_INDEX=""
# hadolint ignore=DL3013
RUN if ! python3 -c 'import torch'; then \
        set -- ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} && \
        { python3 -m pip install --no-cache-dir "$@" "torch==${TORCH_VERSION}+cpu" || \
          python3 -m pip install --no-cache-dir "$@" "torch==${TORCH_VERSION}"; }; \
    fi

WORKDIR /opt/moeprune
COPY requirements.txt ./
RUN python3 -m pip install --no-cache-dir -r requirements.txt

COPY . .
ENV REAP_RUNTIME=native REAP_PYTHON=python3 \
    PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    OMP_WAIT_POLICY=PASSIVE HOME=/tmp USER=moeprune
USER 1000:1000

# The entrypoint of NVIDIA's images prints a banner on stdout, where only results belong.
ENTRYPOINT ["/bin/sh", "-c", "base=/opt/nvidia/nvidia_entrypoint.sh; [ -x $base ] || exec \"$@\"; exec 3>&1 1>&2; exec $base sh -c 'exec 1>&3 3>&-; exec \"$@\"' sh \"$@\"", "sh"]
CMD ["bash"]
