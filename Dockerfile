# ddo on CUDA. The build needs a clone: docker build -t ddo .
FROM python:3.12-slim-bookworm

# The wheels of torch bring CUDA; the host needs a driver and the NVIDIA container toolkit.
COPY . /src
RUN pip install --no-cache-dir /src && rm -rf /src

# Caches and runs are the caller's: mount a directory here.
ENV HOME=/work
WORKDIR /work
ENTRYPOINT ["ddo"]
CMD ["--help"]
