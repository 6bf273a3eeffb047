"""The REST API under `/api/v1`. `schemas` is light; `app.create_api` brings the web stack."""
