"""The HTTP application: the list of its routes, and the middleware that every request passes."""

import difflib
from importlib.metadata import version
from typing import TYPE_CHECKING

import msgspec
from anyio.to_thread import run_sync
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from loradeck.api import adapters, file_check, files, fine_tuning, job_plan, page, pooling, tokenization
from loradeck.api import requests as req
from loradeck.api import responses as res
from loradeck.api import training_requests as training_req
from loradeck.api import training_responses as training_res
from loradeck.api.adapter_changes import combine_adapters, delete_model
from loradeck.api.adapter_comparison import compare_adapters
from loradeck.api.adapter_upload import upload_adapter
from loradeck.api.auth import ApiKeys, AuthMiddleware
from loradeck.api.chat import create_chat_completion
from loradeck.api.completions import create_completion
from loradeck.api.config import ServerConfig
from loradeck.api.errors import HttpError, error_handler, shutting_down
from loradeck.api.evaluate import evaluate
from loradeck.api.host import HostMiddleware
from loradeck.api.key import KeyRights, get_key
from loradeck.api.middleware import RequestMiddleware
from loradeck.api.openapi import Operation, openapi_document
from loradeck.api.state import ServerState, state_of
from loradeck.api.upload_form import FORM
from loradeck.base.task import POOLING
from loradeck.errors import LoradeckError
from loradeck.evaluation.report import Report

if TYPE_CHECKING:
    from loradeck.api.metrics import Metrics
    from loradeck.live.live_training import LiveTraining
    from loradeck.serve.engine import Engine
    from loradeck.serve.pooling_engine import PoolingEngine

GENERATE, SCORE = ("generate",), ("classify", "reward", "embed")  # tasks
CLASSES, EMBEDDINGS = res.ResultList[res.Classification], res.ResultList[res.Embedding]
FILES, JOB_PAGE = training_res.Page[training_res.FileObject], training_res.Page[training_res.FineTuningJob]
JOB = training_res.FineTuningJob
CHAT, JOBS = "/v1/chat/completions", "/v1/fine_tuning/jobs"
MAX_PATH = 128  # characters of an unknown path that are looked at


async def get_health(request: Request) -> Response:
    """Return 200 while the server takes requests."""
    if state_of(request).shutting_down:
        raise shutting_down()
    return res.json_response(res.HealthResponse("ok"))


async def get_version(_: Request) -> Response:
    """Return the library's version."""
    return res.json_response(res.VersionResponse(version("loradeck")))


async def get_metrics(request: Request) -> Response:
    """Return the metrics; they name every adapter, so the key needs control."""
    request.state.key.check_control()
    return Response(await run_sync(state_of(request).metrics.read), media_type=CONTENT_TYPE_LATEST)


async def get_openapi(_: Request) -> Response:
    """Return the OpenAPI document."""
    return Response(DOCUMENT, media_type=res.JSON)


async def unknown_route(scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG001
    """Refuse a path that no route has."""
    close = difflib.get_close_matches(scope["path"][:MAX_PATH], PATHS, n=1, cutoff=0.7)
    hint = f"Did you mean {close[0]}?" if close else "GET /openapi.json lists the routes."
    raise HttpError(404, f"There is no route {scope['path'][:MAX_PATH]}.", hint=hint)


NAMED = (400, 404, 422)  # statuses of routes that name an adapter
OPERATIONS = [
    Operation("GET", "/v1/models", adapters.list_models, None, res.ModelList),
    Operation("GET", "/v1/models/{id:path}", adapters.get_model, None, res.ModelCard, errors=(404, 422)),
    Operation("DELETE", "/v1/models/{id:path}", delete_model, None, res.ModelDeleted, errors=(400, 404, 422)),
    Operation(
        "POST",
        "/v1/adapters",
        upload_adapter,
        req.UploadAdapterRequest,
        res.ModelCard,
        (404, 422, 503, 507),
        body_media=FORM,
    ),
    Operation("GET", "/v1/adapters/{name}/versions", adapters.list_versions, None, res.ModelList, errors=(404, 422)),
    Operation(
        "POST",
        "/v1/adapters/combine",
        combine_adapters,
        req.CombineRequest,
        res.ModelCard,
        (404, 422, 429),
    ),
    Operation(
        "GET",
        "/v1/adapters/compare",
        compare_adapters,
        None,
        res.AdapterComparison,
        (404, 422, 429),
        query=req.ComparisonQuery,
    ),
    Operation(
        "POST",
        CHAT,
        create_chat_completion,
        req.ChatCompletionRequest,
        res.ChatCompletion,
        tasks=GENERATE,
        streams=True,
    ),
    Operation(
        "POST",
        "/v1/completions",
        create_completion,
        req.CompletionRequest,
        res.TextCompletion,
        tasks=GENERATE,
        streams=True,
    ),
    Operation("POST", "/evaluate", evaluate, req.EvaluateRequest, Report, errors=(404, 422, 429, 503), tasks=GENERATE),
    Operation("POST", "/classify", pooling.classify, req.ClassifyRequest, CLASSES, tasks=("classify",)),
    Operation("POST", "/v1/embeddings", pooling.create_embeddings, req.EmbeddingRequest, EMBEDDINGS, tasks=("embed",)),
    Operation("POST", "/pooling", pooling.pool, req.PoolingRequest, res.ResultList[res.Pooled], tasks=POOLING),
    Operation("POST", "/score", pooling.score, req.ScoreRequest, res.ResultList[res.Score], tasks=SCORE),
    Operation("POST", "/v1/score", pooling.score_v1, req.ScoreRequest, res.ResultList[res.Score], tasks=SCORE),
    Operation("POST", "/v1/load_lora_adapter", adapters.load_adapter, req.LoadAdapterRequest, errors=(404, 422)),
    Operation("POST", "/v1/unload_lora_adapter", adapters.unload_adapter, req.UnloadAdapterRequest, errors=(404, 422)),
    Operation("GET", "/lora-adapters", adapters.list_lora_adapters, None, list[res.LoraAdapter]),
    Operation("POST", "/lora-adapters", adapters.set_lora_scales, list[req.LoraScale], res.SuccessResponse, (404,)),
    Operation("POST", "/tokenize", tokenization.tokenize, req.TokenizeRequest, res.TokenizeResponse, NAMED),
    Operation("POST", "/detokenize", tokenization.detokenize, req.DetokenizeRequest, res.DetokenizeResponse, NAMED),
    Operation(
        "GET", "/tokenizer_info", tokenization.tokenizer_info, None, res.TokenizerInfo, NAMED, query=req.ModelQuery
    ),
    Operation(
        "POST",
        "/v1/files",
        files.create_file,
        training_req.UploadRequest,
        training_res.FileObject,
        (404, 507),
        body_media=FORM,
    ),
    Operation("GET", "/v1/files", files.list_files, None, FILES, (404,), query=training_req.FilesQuery),
    Operation("GET", "/v1/files/{id}", files.get_file, None, training_res.FileObject, (404,)),
    Operation("DELETE", "/v1/files/{id}", files.delete_file, None, training_res.FileDeleted, (404, 507)),
    Operation("GET", "/v1/files/{id}/content", files.get_file_content, errors=(404,), media=files.OCTETS),
    Operation(
        "GET",
        "/v1/files/{id}/check",
        file_check.check_file,
        None,
        file_check.FileCheck,
        (404, 429, 507),
        query=training_req.CheckQuery,
    ),
    Operation(
        "POST",
        "/v1/fine_tuning/plan",
        job_plan.plan_job,
        training_req.FineTuningJobRequest,
        job_plan.FineTuningPlan,
        (404, 422, 429, 507),
    ),
    Operation("POST", JOBS, fine_tuning.create_job, training_req.FineTuningJobRequest, JOB, (404, 422, 429, 507)),
    Operation("GET", JOBS, fine_tuning.list_jobs, None, JOB_PAGE, (404,), query=training_req.PageQuery),
    Operation("GET", f"{JOBS}/{{id}}", fine_tuning.get_job, None, JOB, (404,)),
    Operation("POST", f"{JOBS}/{{id}}/cancel", fine_tuning.cancel_job, None, JOB, (400, 404, 507)),
    Operation("POST", f"{JOBS}/{{id}}/pause", fine_tuning.pause_job, None, JOB, (400, 404, 507)),
    Operation("POST", f"{JOBS}/{{id}}/resume", fine_tuning.resume_job, None, JOB, (400, 404, 507)),
    Operation(
        "GET",
        f"{JOBS}/{{id}}/events",
        fine_tuning.list_events,
        None,
        training_res.Page[training_res.FineTuningJobEvent],
        (404,),
        query=training_req.EventsQuery,
        streams=True,
    ),
    Operation(
        "GET",
        f"{JOBS}/{{id}}/checkpoints",
        fine_tuning.list_checkpoints,
        None,
        training_res.Page[training_res.FineTuningJobCheckpoint],
        (404,),
        query=training_req.PageQuery,
    ),
    Operation("GET", "/v1/key", get_key, None, KeyRights),
    Operation("GET", "/", page.get_page, media="text/html"),
    Operation("GET", "/page/{file}", page.get_page_file, errors=(404,), media="application/octet-stream"),
    Operation("GET", "/health", get_health, None, res.HealthResponse, errors=(503,)),
    Operation("GET", "/version", get_version, None, res.VersionResponse),
    Operation("GET", "/metrics", get_metrics),
    Operation("GET", "/openapi.json", get_openapi, None, dict),
]
PATHS = [operation.route.path_format for operation in OPERATIONS]
DOCUMENT = msgspec.json.encode(openapi_document(OPERATIONS))


def app(
    engine: "Engine | PoolingEngine",
    metrics: "Metrics",
    *,
    keys: ApiKeys | None = None,
    config: ServerConfig | None = None,
    training: "LiveTraining | None" = None,
) -> Starlette:
    """Return the OpenAI-compatible application of an engine.

    Without keys every client may do everything, so the application answers only for this machine's own names and for
    the hosts of `config`.

    Args:
        engine: The engine that answers.
        metrics: The engine's observer.
        keys: API keys; without any, every request is let in.
        config: Limits of the server.
        training: What trains adapters between the engine's steps; without, the server has no files and jobs.
    """
    state = ServerState(engine, metrics, keys or ApiKeys(), config or ServerConfig(), training)
    handle_error = error_handler(state.store_path)
    hosts = ["*"] if state.keys else state.config.hosts
    middleware = [Middleware(RequestMiddleware, state, handle_error), Middleware(HostMiddleware, hosts, handle_error)]
    if state.config.origins:
        origins = [*state.config.origins]
        middleware.append(Middleware(CORSMiddleware, origins, allow_methods=["*"], allow_headers=["*"]))
    middleware.append(Middleware(AuthMiddleware, state.keys, handle_error))
    application = Starlette(
        routes=[operation.route for operation in OPERATIONS],
        middleware=middleware,
        exception_handlers=dict.fromkeys((LoradeckError, HTTPException, ClientDisconnect), handle_error),
    )
    application.router.default = unknown_route
    application.state.server = state
    return application
