.PHONY: check format

check:
	.ci/run

format:
	uv run ruff format .
	uv run ruff check --fix .
