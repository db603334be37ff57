// The console.  Every text is set as text, never as markup; the key is in this closure and in request headers only.
"use strict";

(() => {
  const EVERY = 400; // milliseconds from one look to the next
  const KEPT = 24; // rows of a strip
  const STAGES = [
    ["own", "the vault's own layers"], ["masks", "taking masks"], ["masking", "masking"], ["wire", "wire"],
    ["worker", "worker"], ["check", "check"], ["opening", "opening"], ["failed", "failed tries"],
  ];
  const at = (id) => document.getElementById(id);

  let key = null;
  let timer = null;
  let since = 0;
  let group = null;
  let before = null; // what was seen last, with its time: rates are differences
  let last = null;
  let talk = [];
  let answering = null;
  let standing = new Map();

  const made = (name, className, text) => {
    const element = document.createElement(name);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const count = (value) => Math.round(value).toLocaleString("en");
  const bytes = (value) => {
    const units = ["B", "kB", "MB", "GB", "TB"];
    let unit = 0;
    while (value >= 1000 && unit < units.length - 1) { value /= 1000; unit += 1; }
    return `${value < 10 && unit ? value.toFixed(1) : Math.round(value)} ${units[unit]}`;
  };
  const asked = (path, options = {}) => fetch(path, {
    ...options, cache: "no-store", credentials: "omit", redirect: "error", referrerPolicy: "no-referrer",
    headers: { ...options.headers, authorization: `Bearer ${key}` },
  });
  const told = async (answer) => {
    try { return (await answer.json()).error.message; } catch { return `status ${answer.status}`; }
  };

  // --- the door ---------------------------------------------------------------------------------------------

  function lock(why = "") {
    key = null;
    clearTimeout(timer);
    if (answering) answering.abort();
    talk = []; since = 0; group = before = last = null; standing = new Map();
    for (const id of ["talk", "parties", "figures", "stages", "model"]) at(id).replaceChildren();
    for (const id of ["group", "step", "line", "said", "ask-error"]) at(id).textContent = "";
    for (const id of ["masked", "true", "histogram", "way"]) wipe(at(id));
    at("message").value = at("key").value = "";
    at("room").hidden = at("lock").hidden = true;
    at("door").hidden = false;
    at("door-error").textContent = why;
    at("key").focus();
  }

  at("door").addEventListener("submit", async (event) => {
    event.preventDefault();
    key = at("key").value.trim();
    at("door-error").textContent = "";
    if (!/^[\x21-\x7e]+$/.test(key)) return lock("This is no key.");
    const shown = await look();
    if (!shown) return undefined;
    at("key").value = "";
    at("door").hidden = true;
    at("room").hidden = at("lock").hidden = false;
    draw();
    at(shown.ask ? "message" : "talk").focus();
    return undefined;
  });
  at("lock").addEventListener("click", () => lock());
  window.addEventListener("pagehide", () => lock());

  // --- looking ----------------------------------------------------------------------------------------------

  async function look() {
    clearTimeout(timer);
    const mine = key;
    try {
      const answer = await asked(`/console/state?since=${since}`);
      if (mine !== key || key === null) return null;
      if (answer.status === 401 || answer.status === 403) { lock(await told(answer)); return null; }
      if (!answer.ok) throw new Error(await told(answer));
      const shown = await answer.json();
      if (mine !== key || key === null) return null;
      take(shown);
      timer = setTimeout(next, EVERY);
      return shown;
    } catch (error) {
      if (mine !== key || key === null) return null;
      const why = `The server does not answer (${error.message}).`;
      at("line").textContent = at("door-error").textContent = why;
      timer = setTimeout(next, 4 * EVERY);
      return null;
    }
  }

  function next() { // a console that nobody looks at asks nothing: the server keeps nothing then
    if (key !== null && !at("room").hidden && !document.hidden) look();
  }
  document.addEventListener("visibilitychange", next);

  function take(shown) {
    const now = performance.now();
    if (shown.group !== group) { group = shown.group; wipe(at("masked")); wipe(at("true")); }
    for (const row of shown.rows) {
      since = Math.max(since, row.number);
      addRow(at("masked"), row.masked);
      if (row.true !== null) addRow(at("true"), row.true);
    }
    at("true-figure").hidden = !shown.activations;
    at("no-true").hidden = shown.activations;
    at("group").textContent = group === null ? "nothing yet: ask something" : group;
    last = shown;
    models(shown.models);
    parties(shown.parties);
    figures(shown, now);
    step(shown.step);
    for (const id of ["message", "send"]) at(id).disabled = !shown.ask || (id === "send" && answering !== null);
    if (!shown.ask) at("ask-error").textContent = "This key may look, and not ask.";
    const { running, waiting } = shown.load;
    at("line").textContent = `${shown.models[0]}: computing ${running}, waiting ${waiting}`;
    if (!at("room").hidden) draw();
  }

  function models(names) {
    const select = at("model");
    if (select.options.length === names.length) return;
    select.replaceChildren(...names.map((name) => { const option = made("option", "", name); option.value = name; return option; }));
  }

  const STATES = { quarantined: "✕ quarantined", lost: "– dead", suspended: "– suspended", drained: "– drained" };

  function parties(all) {
    at("parties").replaceChildren(...all.map((one) => {
      const up = one.state === "up";
      const kind = one.state === "quarantined" ? "quarantined" : !up ? "dead" : one.verified === null ? "ready" : "verified";
      const state = up ? (one.verified === null ? "○ ready" : "✓ verified") : STATES[one.state] || one.state;
      const card = made("li", `party ${kind}`);
      card.append(made("span", "name", `${one.role} ${one.address}`), made("span", "state", state));
      const checks = one.verified === null ? "not asked yet" : `last good answer ${age(one.verified)} ago`;
      const wrong = one.wrong ? `, ${count(one.wrong)} wrong` : "";
      card.append(made("p", "", `${count(one.served)} answers checked and good${wrong}; ${checks}`));
      if (one.reason) card.append(made("p", "", one.reason));
      const was = standing.get(one.address);
      if (was !== undefined && was !== kind && kind !== "verified") at("said").textContent = `${one.role} ${one.address}: ${state.slice(2)}`;
      standing.set(one.address, kind);
      return card;
    }));
  }

  function age(seconds) {
    if (seconds < 90) return `${Math.round(seconds)} s`;
    return seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${Math.round(seconds / 3600)} h`;
  }

  function figures(shown, now) {
    const { masks, counters } = shown;
    const spent = before === null ? 0 : (now - before.now) / 1000;
    const rate = (name) => (spent > 0 ? Math.max(0, counters[name] - before.counters[name]) / spent : 0);
    const pairs = [
      ["Rows of masks ready", `${count(masks.rows)} in ${count(masks.groups)} groups`],
      ["The group with fewest", `${count(masks.least)} rows`],
      ["Memory of masks", bytes(masks.bytes)],
      ["Dealt now", `${count(rate("rows_dealt"))} rows/s`],
      ["Used now", `${count(rate("rows"))} rows/s`],
      ["Dealt while one waited", `${count(counters.rows_dealt_late)} rows`],
      ["Exchanges", `${count(counters.exchanges)}, ${count(rate("exchanges"))}/s`],
      ["Sent, received", `${bytes(counters.bytes_sent)}, ${bytes(counters.bytes_received)}`],
      ["Asked again of another", count(counters.retries)],
    ];
    before = { now, counters };
    at("figures").replaceChildren(...pairs.map(([name, value]) => {
      const pair = made("div");
      pair.append(made("dt", "", name), made("dd", "", value));
      return pair;
    }));
  }

  function stages(found) { // milliseconds of each, and what is drawn: lane, stage, from, to
    const sums = Object.fromEntries(STAGES.map(([name]) => [name, 0]));
    const bars = [];
    const add = (lane, name, from, to) => { if (to > from) { sums[name] += to - from; bars.push([lane, name, from, to]); } };
    for (const [, , failed, begun, taken, sent, answered, checked, ended, computed] of found.exchanges) {
      if (failed !== null) { add(1, "failed", sent, answered); continue; }
      const there = sent + Math.max(0, answered - sent - computed) / 2;
      const back = Math.min(answered, there + computed);
      add(0, "masks", begun, taken); add(0, "masking", taken, sent);
      add(1, "wire", sent, there); add(2, "worker", there, back); add(1, "wire", back, answered);
      add(0, "check", answered, checked); add(0, "opening", checked, ended);
    }
    const rest = Object.values(sums).reduce((sum, value) => sum + value, 0);
    sums.own = Math.max(0, found.milliseconds - rest);
    return { sums, bars };
  }

  function step(found) {
    if (found === null) { at("step").textContent = ""; at("stages").replaceChildren(); return; }
    const kind = found.prompt ? `${found.prompt} tokens read` : `${found.rows} token${found.rows === 1 ? "" : "s"} made`;
    at("step").textContent =
      `${kind}, ${found.exchanges.length} exchanges, ${found.milliseconds.toFixed(1)} ms${found.failed ? `, ${found.failed}` : ""}`;
    const { sums } = stages(found);
    at("stages").replaceChildren(...STAGES.filter(([name]) => sums[name] > 0).map(([name, words]) => {
      const item = made("li");
      item.append(made("span", `swatch ${name}`), `${words} ${sums[name].toFixed(sums[name] < 1 ? 2 : 1)} ms`);
      return item;
    }));
  }

  // --- drawing ----------------------------------------------------------------------------------------------

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const parts = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));

  function wipe(canvas) { canvas.getContext("2d").clearRect(0, 0, canvas.width, canvas.height); canvas.rows = []; }

  function addRow(canvas, text) {
    const row = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    canvas.rows = [row, ...(canvas.rows || [])].slice(0, KEPT);
  }

  function strip(canvas) { // one scale of colours for both: nought is the ground
    const rows = canvas.rows || [];
    if (!rows.length) return;
    canvas.width = rows[0].length;
    canvas.height = KEPT;
    const [ground, low, high] = ["ground", "low", "high"].map((name) => parts(colour(name)));
    const image = new ImageData(canvas.width, KEPT);
    rows.forEach((row, y) => row.forEach((value, x) => {
      const part = Math.max(-1, Math.min(1, (value - 128) / 127));
      const end = part < 0 ? low : high;
      const place = 4 * (y * canvas.width + x);
      for (let i = 0; i < 3; i += 1) image.data[place + i] = ground[i] + (end[i] - ground[i]) * Math.sqrt(Math.abs(part));
      image.data[place + 3] = 255;
    }));
    canvas.getContext("2d").putImageData(image, 0, 0);
  }

  function sheet(canvas) { // sharp at any zoom
    const ratio = window.devicePixelRatio || 1;
    const { width, height } = canvas.getBoundingClientRect();
    canvas.width = Math.max(1, Math.round(width * ratio));
    canvas.height = Math.max(1, Math.round(height * ratio));
    const pen = canvas.getContext("2d");
    pen.scale(ratio, ratio);
    pen.font = "12px system-ui, sans-serif";
    return { pen, width, height };
  }

  function histogram(counts) {
    const all = counts.reduce((sum, value) => sum + value, 0);
    const { pen, width, height } = sheet(at("histogram"));
    if (!all) { at("histogram-caption").textContent = "How often each size of masked number was sent."; return; }
    const mean = all / counts.length;
    const top = Math.max(1.25 * mean, ...counts);
    const wide = width / counts.length;
    pen.fillStyle = colour("wire");
    counts.forEach((value, i) => pen.fillRect(i * wide + 1, height - height * value / top, wide - 2, height * value / top));
    pen.strokeStyle = colour("ink");
    pen.setLineDash([4, 3]);
    pen.beginPath();
    pen.moveTo(0, height - height * mean / top);
    pen.lineTo(width, height - height * mean / top);
    pen.stroke();
    const far = Math.max(...counts.map((value) => Math.abs(value - mean))) / Math.sqrt(mean);
    at("histogram-caption").textContent = `How often each size of masked number was sent: ${count(all)} numbers in ` +
      `${counts.length} bins; the bin farthest from even is off by ${far.toFixed(1)} standard deviations.`;
  }

  function way(found) {
    const { pen, width, height } = sheet(at("way"));
    if (found === null) return;
    const names = ["vault", "wire", "worker"];
    const left = 52;
    const tall = height / names.length;
    const across = (width - left) / Math.max(found.milliseconds, 1e-9);
    pen.textBaseline = "middle";
    names.forEach((name, lane) => {
      pen.fillStyle = colour("soft");
      pen.fillText(name, 0, (lane + 0.5) * tall);
      pen.fillStyle = colour(lane === 0 ? "own" : "tint");
      pen.fillRect(left, lane * tall + 3, width - left, tall - 6);
    });
    for (const [lane, name, from, to] of stages(found).bars) {
      pen.fillStyle = colour(name === "failed" ? "bad" : name);
      pen.fillRect(left + from * across, lane * tall + 3, Math.max(0.7, (to - from) * across), tall - 6);
    }
  }

  function draw() {
    if (last === null) return;
    strip(at("masked"));
    strip(at("true"));
    histogram(last.counts);
    way(last.step);
  }
  window.addEventListener("resize", draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);

  // --- talking ----------------------------------------------------------------------------------------------

  function turn(role, text) {
    const element = made("div", `turn ${role}`);
    element.append(made("span", "who", role === "user" ? "you" : at("model").value), made("span", "text", text));
    at("talk").append(element);
    at("talk").scrollTop = at("talk").scrollHeight;
    return element;
  }

  async function* events(body) {
    const reader = body.pipeThrough(new TextDecoderStream()).getReader();
    let held = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      held += value;
      const whole = held.split("\n\n");
      held = whole.pop();
      for (const each of whole) if (each.startsWith("data: ")) yield each.slice(6);
    }
  }

  async function answer(into, body) {
    const got = await asked("/v1/chat/completions", {
      method: "POST", body: JSON.stringify(body), signal: answering.signal,
      headers: { "content-type": "application/json" },
    });
    if (!got.ok) throw new Error(await told(got));
    for await (const event of events(got.body)) {
      if (event === "[DONE]") return;
      const piece = JSON.parse(event);
      if (piece.error) throw new Error(piece.error.message);
      const near = at("talk").scrollHeight - at("talk").scrollTop - at("talk").clientHeight < 60;
      into.textContent += piece.choices[0].delta.content || "";
      if (near) at("talk").scrollTop = at("talk").scrollHeight;
    }
    throw new Error("the answer was cut short");
  }

  async function send() {
    const text = at("message").value;
    if (!text.trim() || answering !== null || key === null) return;
    const mine = key;
    const here = talk; // another one once it was begun anew
    answering = new AbortController();
    at("message").value = at("ask-error").textContent = "";
    at("send").disabled = true;
    at("stop").disabled = false;
    here.push({ role: "user", content: text });
    turn("user", text);
    const reply = turn("assistant", "");
    const into = reply.querySelector(".text");
    at("talk").setAttribute("aria-busy", "true");
    const body = { model: at("model").value, messages: here, stream: true };
    if (at("heat").value) body.temperature = Number(at("heat").value);
    if (at("most").value) body.max_tokens = Number(at("most").value);
    try {
      await answer(into, body);
    } catch (error) {
      if (mine !== key) return;
      if (error.name !== "AbortError") {
        reply.classList.add("failed");
        at("ask-error").textContent = error.message;
      }
    } finally {
      answering = null;
      at("talk").removeAttribute("aria-busy");
      at("send").disabled = mine !== key;
      at("stop").disabled = true;
    }
    if (into.textContent) here.push({ role: "assistant", content: into.textContent });
    else { here.pop(); reply.remove(); }
  }

  at("ask").addEventListener("submit", (event) => { event.preventDefault(); send(); });
  at("message").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
  });
  at("stop").addEventListener("click", () => { if (answering) answering.abort(); at("message").focus(); });
  at("anew").addEventListener("click", () => {
    if (answering) answering.abort();
    talk = [];
    at("talk").replaceChildren();
    at("ask-error").textContent = "";
    at("message").focus();
  });
  at("key").focus();
})();
