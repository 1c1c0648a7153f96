"""Generated conversations with tools: the request, the call, its result and the last word."""

from __future__ import annotations

import json
import re
from random import Random
from typing import Any

from moeprune.scoring.calibration.builtin.words import CITIES, GOODS, NAMES

# Tool -> what it does and its parameters, each as name:type:meaning.
TOOLS: dict[str, tuple[str, str]] = {
    "get_weather": ("Current weather of a city.", "city:string:Name of the city. unit:string:celsius or fahrenheit."),
    "convert_currency": (
        "Convert an amount of money.",
        "amount:number:How much. source:string:ISO code. target:string:ISO code.",
    ),
    "create_event": (
        "Put an event into the calendar.",
        "title:string:What it is. date:string:YYYY-MM-DD. minutes:integer:Length.",
    ),
    "search_orders": ("Find the orders of a customer.", "customer:string:Name. status:string:open, sent or returned."),
    "run_query": ("Run a read-only SQL query.", "sql:string:The statement. limit:integer:Rows at most."),
    "read_file": ("Read a text file.", "path:string:Path in the workspace."),
    "send_message": ("Send a short message.", "to:string:Receiver. text:string:What to say."),
}
PARAMETER = re.compile(r"(\w+):(\w+):([^.]*\.)")


def schema(name: str) -> dict[str, Any]:
    """A tool as JSON schema, every parameter required."""
    about, fields = TOOLS[name]
    properties = {key: {"type": kind, "description": text} for key, kind, text in PARAMETER.findall(fields)}
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": about, "parameters": parameters}}


def request(name: str, rng: Random) -> tuple[str, dict[str, Any], Any, str]:
    """What is asked, the arguments, what the tool answers, and the last word."""
    who, city, number = rng.choice(NAMES), rng.choice(CITIES), rng.randint(2, 95)
    if name == "get_weather":
        result = {"city": city, "temperature": number % 30, "sky": rng.choice(["clear", "rain", "fog", "snow"])}
        return f"Do I need an umbrella in {city} today?", {"city": city, "unit": "celsius"}, result, (
            f"{'Yes, take one' if result['sky'] == 'rain' else 'No'}: it is {result['temperature']} degrees in {city}, "
            f"with {result['sky'] if result['sky'] != 'clear' else 'a clear sky'}."
        )  # fmt: skip
    if name == "convert_currency":
        source, target = rng.sample(["EUR", "USD", "JPY", "GBP", "INR", "BRL"], 2)
        rate = round(rng.uniform(0.2, 4), 3)
        value = round(number * rate, 2)
        arguments = {"amount": number, "source": source, "target": target}
        return f"How much is {number} {source} in {target}?", arguments, {"rate": rate, "value": value}, (
            f"{number} {source} are {value} {target} at a rate of {rate}."
        )  # fmt: skip
    if name == "create_event":
        date = f"2026-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"
        arguments = {"title": f"Call with {who}", "date": date, "minutes": number // 5 * 5 + 10}
        return f"Please put a call with {who} into my calendar on {date}, {arguments['minutes']} minutes.", arguments, (
            {"id": f"ev{number}", "created": True}
        ), f"Done: \"Call with {who}\" is in your calendar on {date} for {arguments['minutes']} minutes."  # fmt: skip
    if name == "search_orders":
        found = [{"order": 4000 + number + i, "item": rng.choice(GOODS)} for i in range(number % 3)]
        listed = ", ".join(f"no. {order['order']} ({order['item']})" for order in found) or "none at all"
        return (
            f"Which orders of {who} are still open?",
            {"customer": who, "status": "open"},
            found,
            f"Open orders: {listed}.",
        )
    if name == "run_query":
        sql = f"SELECT city, COUNT(*) AS n FROM visits WHERE n_people > {number} GROUP BY city ORDER BY n DESC"
        rows = [[c, 90 - 7 * i] for i, c in enumerate(rng.sample(CITIES, 2))]
        return f"Top two cities by number of visits with more than {number} people?", {"sql": sql, "limit": 2}, rows, (
            f"{rows[0][0]} leads with {rows[0][1]} visits, then comes {rows[1][0]} with {rows[1][1]}."
        )  # fmt: skip
    if name == "read_file":
        path = f"notes/{rng.choice(GOODS)}.md"
        text = f"# Stock\n- {number} in {city}\n- reorder below {number // 2}"
        return f"What does {path} say about the stock?", {"path": path}, text, (
            f"There are {number} in {city}; reorder when fewer than {number // 2} are left."
        )  # fmt: skip
    said = f"The meeting in {city} moves to {number % 12 + 8}:00."
    return f"Tell {who}: {said}", {"to": who, "text": said}, {"sent": True}, f"I have told {who}."


def tool_chat(rng: Random) -> dict[str, Any]:
    """One or two requests, each with a call, its result and a closing sentence."""
    offered = rng.sample(sorted(TOOLS), rng.randint(2, 4))
    messages: list[dict[str, Any]] = []
    if rng.random() < 0.5:
        messages.append(
            {
                "role": "system",
                "content": "You are an assistant with tools. Use one when it helps, then answer briefly.",
            }
        )
    for number, name in enumerate(offered[: rng.randint(1, 2)]):
        asked, arguments, result, last = request(name, rng)
        call = {"id": f"call_{number}", "type": "function", "function": {"name": name, "arguments": arguments}}
        answer = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)
        messages += [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": call["id"], "name": name, "content": answer},
            {"role": "assistant", "content": last},
        ]
    return {"messages": messages, "tools": json.dumps([schema(name) for name in offered])}
