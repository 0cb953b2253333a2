"use strict";
(() => {
  const data = JSON.parse(document.getElementById("samples-data").textContent);
  const view = document.getElementById("samples-view");
  const PAGE = 50; // prompts that are listed at a time

  // An element with attributes and children; a text is always a text, never HTML.
  function make(name, attributes = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }

  function choice(words, options) {
    const list = make("select", {}, ...options.map(([value, text]) => make("option", { value }, text)));
    return { label: make("label", {}, words, list), list };
  }

  const unique = (values) => [...new Set(values)];
  const nameOf = (answer) => data.configurations[answer.of].name;
  const methodOf = (answer) => data.configurations[answer.of].method;
  const isLost = (prompt, answer) => prompt.full !== null && answer.score < prompt.full.score;
  const isWrong = (prompt, answer) => isLost(prompt, answer) && prompt.full.score === 100;
  const plain = (answer) =>
    (answer.parts || []).filter(([kind]) => kind !== "missing").map(([, text]) => text).join("");

  for (const prompt of data.prompts) {
    const texts = [prompt.id, prompt.subtask, prompt.question || "", ...prompt.references];
    texts.push(prompt.full ? prompt.full.text : "", ...prompt.answers.map(plain));
    prompt.words = texts.join("\n").toLowerCase();
  }

  // Filters ---------------------------------------------------------------------------------------

  const any = (words) => ["", words];
  const named = (values) => unique(values).map((value) => [value, value]);
  const settings = unique(data.prompts.map((one) => one.setting));
  const setting = choice("Setting", [any("all"), ...named(settings)]);
  const subtask = choice("Sub-task", [any("all"), ...named(data.prompts.map((one) => one.subtask))]);
  const method = choice("Method", [
    any("all"),
    ...unique(data.configurations.map((one) => one.method)).map((name) => [`m:${name}`, name]),
    ...data.configurations.map((one, place) => [`c:${place}`, one.name]),
  ]);
  const only = choice("Answers", [
    any("all"),
    ["wrong", "full attention right, method wrong"],
    ["lost", "lower than full attention's"],
  ]);
  only.list.id = "samples-only";
  const search = make("input", { type: "search", placeholder: "in question and answers" });
  const count = make("p", { class: "soft", role: "status" });
  const list = make("ol");
  const more = make("button", { type: "button" }, "Show more");
  setting.label.hidden = settings.length < 2;

  // What tells a setting apart from the others.
  const pieces = (words) => words.split(", ");
  const ownWords = (words) =>
    pieces(words).filter((piece) => !settings.every((other) => pieces(other).includes(piece))).join(", ");

  const isChosen = (answer) => {
    const value = method.list.value;
    return !value || value === `m:${methodOf(answer)}` || value === `c:${answer.of}`;
  };

  const isShown = (prompt, answer) =>
    isChosen(answer) &&
    ({ wrong: isWrong, lost: isLost }[only.list.value] || (() => true))(prompt, answer);

  let found = [];
  function update() {
    const words = search.value.toLowerCase();
    found = data.prompts.filter(
      (prompt) =>
        (!setting.list.value || prompt.setting === setting.list.value) &&
        (!subtask.list.value || prompt.subtask === subtask.list.value) &&
        (!method.list.value || prompt.answers.some(isChosen)) &&
        (!only.list.value || prompt.answers.some((one) => isShown(prompt, one))) &&
        prompt.words.includes(words)
    );
    count.textContent = `${found.length} of ${data.prompts.length} prompts`;
    list.replaceChildren();
    extend();
  }

  function extend() {
    const begin = list.children.length;
    list.append(...found.slice(begin, begin + PAGE).map(entry));
    more.hidden = list.children.length >= found.length;
  }

  // One prompt ------------------------------------------------------------------------------------

  function entry(prompt) {
    const answers = prompt.answers.filter(isChosen);
    const number = answers.filter((one) => isLost(prompt, one)).length;
    const seed = prompt.seed === null ? "" : `seed ${prompt.seed}`;
    const summary = make("summary", {}, make("span", { class: "id" }, prompt.id));
    const tag = (text, kind = "") => summary.append(" ", make("span", { class: `tag ${kind}` }, text));
    tag(prompt.subtask);
    if (seed) tag(seed);
    if (settings.length > 1) tag(ownWords(prompt.setting));
    tag(prompt.full ? `full ${round(prompt.full.score)}` : "without full attention");
    if (number) tag(`${number} of ${answers.length} lost`, "lost");
    const details = make("details", {}, summary);
    details.addEventListener(
      "toggle",
      () => details.children.length < 2 && details.append(body(prompt, answers.filter((one) => isShown(prompt, one))))
    );
    return make("li", {}, details);
  }

  const round = (score) => String(Math.round(score * 10) / 10);
  const block = (text, kind = "") => make("div", { class: `text ${kind}`, dir: "auto" }, text);

  function body(prompt, answers) {
    const facts = make("dl");
    const fact = (name, content) => facts.append(make("dt", {}, name), make("dd", {}, content));
    fact("Setting", prompt.setting);
    fact("Question", prompt.question === null ? "not recorded" : block(prompt.question, "long"));
    const references = make("div", {}, ...prompt.references.map((one) => block(one)));
    fact("References", prompt.references.length ? references : "not recorded");
    const cards = make("div", { class: "cards" });
    if (prompt.full) {
      const words = `Full attention: ${round(prompt.full.score)}`;
      cards.append(card(words, block(prompt.full.text || "(empty)", "long"), "full"));
    } else {
      cards.append(card("Full attention", "Its answer is not among these results.", "full"));
    }
    const alike = [];
    for (const answer of answers) {
      const words = `${nameOf(answer)}: ${round(answer.score)}`;
      if (answer.parts === null) {
        alike.push(words);
        continue;
      }
      const tags = { missing: "del", other: "ins" };
      const text = block("", "long");
      for (const [kind, part] of answer.parts) text.append(kind in tags ? make(tags[kind], {}, part) : part);
      if (!answer.parts.length) text.append("(empty)");
      const made = card(words, text, "");
      if (isLost(prompt, answer)) made.firstChild.append(make("span", { class: "tag lost" }, "lost"));
      cards.append(made);
    }
    const made = make("div", { class: "body" }, facts, cards);
    if (alike.length) {
      made.append(make("p", { class: "alike" }, make("b", {}, "The same answer: "), alike.join("; ")));
    }
    made.append(kept(prompt));
    return made;
  }

  const card = (title, content, kind) =>
    make("div", { class: `card ${kind}` }, make("h4", {}, title), content);

  // Which tokens the heads kept -------------------------------------------------------------------

  function kept(prompt) {
    const say = (text) => make("p", { class: "soft kept" }, text);
    if (!prompt.kept) {
      const where = data.keptRecorded ? "for this prompt" : "in these results";
      return say(`Which tokens each head kept was not recorded ${where} (task.kept_prompts).`);
    }
    if (prompt.kept.leftOut) {
      return say("Which tokens each head kept is in kept.parquet, and too large for this page.");
    }
    const details = make("details", { class: "kept" }, make("summary", {}, "Which tokens each head kept"));
    details.addEventListener(
      "toggle",
      () => details.children.length < 2 && details.append(keptBody(prompt))
    );
    return details;
  }

  // The rows of a cell's bits: a layer and a head each.
  const rowsOf = (cell) =>
    cell.layers.flatMap((layer, place) =>
      Array.from({ length: cell.heads[place] }, (_, head) => ({ layer, head }))
    );

  // Bits as bytes 0 and 1, head after head; see analysis/record/kept_file.py.
  async function bitsOf(cell) {
    const packed = Uint8Array.from(atob(cell.kept), (sign) => sign.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    const bytes = new Uint8Array(await new Response(stream).arrayBuffer());
    const bits = new Uint8Array(rowsOf(cell).length * cell.cached);
    for (let at = 0; at < bits.length; at++) bits[at] = (bytes[at >> 3] >> (7 - (at & 7))) & 1;
    return bits;
  }

  // The first configuration is shown beside the first other one that has lost the prompt, if any.
  function keptBody(prompt) {
    const tokens = prompt.kept;
    const cells = tokens.cells;
    const lost = new Set(prompt.answers.filter((one) => isLost(prompt, one)).map((one) => one.of));
    const known = new Set(cells.map((cell) => cell.of));
    const others = prompt.answers.filter((one) => !known.has(one.of)).map(nameOf);
    const rows = cells.flatMap(rowsOf);
    const numbers = (key) => unique(rows.map((row) => row[key])).sort((a, b) => a - b);
    const layer = choice("Layer", [any("all"), ...numbers("layer").map((one) => [one, String(one)])]);
    const head = choice("KV head", [any("all"), ...numbers("head").map((one) => [one, String(one)])]);
    const options = cells.map((cell, place) => [place, nameOf(cell)]);
    const shown = [choice("Left", options), choice("Right", [any("none"), ...options])];
    const other = cells.findIndex((cell, place) => place > 0 && lost.has(cell.of));
    shown[1].list.value = other > 0 ? String(other) : cells.length > 1 ? "1" : "";
    const filters = make("div", { class: "filters" });
    filters.append(layer.label, head.label, ...shown.map((one) => one.label));
    const pair = make("div", { class: "pair" });
    const scale = make("p", { class: "soft" }, "Share of the chosen heads that kept a token: 0");
    scale.append(make("span", { class: "scale" }), "1. ");
    scale.append(
      `At the last measured step, which reads ${cells[0].cached.toLocaleString("en")} tokens, the answer so far included.`
    );
    if (others.length) scale.append(` Not recorded at this step: ${others.join("; ")}.`);

    async function draw() {
      const made = shown
        .map((one) => one.list.value)
        .filter((value) => value !== "")
        .map((value) => column(cells[Number(value)]));
      pair.replaceChildren(...(await Promise.all(made)));
    }

    async function column(cell) {
      const bits = await bitsOf(cell);
      const wanted = (row) =>
        (layer.list.value === "" || row.layer === Number(layer.list.value)) &&
        (head.list.value === "" || row.head === Number(head.list.value));
      const chosen = rowsOf(cell).flatMap((row, place) => (wanted(row) ? [place] : []));
      const title = make("h4", {}, nameOf(cell));
      if (!chosen.length) {
        return make("div", {}, title, make("p", { class: "soft" }, "It kept this layer dense, or has no such head."));
      }
      const text = make("div", { class: "text tokens", dir: "auto", tabindex: "0" });
      let total = 0;
      let run = null;
      for (let token = 0; token < cell.cached; token++) {
        let keeping = 0;
        for (const row of chosen) keeping += bits[row * cell.cached + token];
        total += keeping;
        if (run === null || run.keeping !== keeping) {
          if (run) text.append(shade(run, chosen.length));
          run = { keeping, text: "" };
        }
        run.text += tokens.texts[token];
      }
      if (run) text.append(shade(run, chosen.length));
      const mean = Math.round(total / chosen.length);
      title.append(`: ${mean} of ${cell.cached} tokens a head`);
      return make("div", {}, title, text);
    }

    const shade = (run, heads) => {
      if (!run.keeping) return run.text;
      const words = `kept by ${run.keeping} of ${heads} heads`;
      return make("span", { style: `--share: ${run.keeping / heads}`, title: words }, run.text);
    };

    for (const one of [layer, head, ...shown]) one.list.addEventListener("change", draw);
    draw();
    return make("div", {}, filters, scale, pair);
  }

  const labelled = make("label", {}, "Search", search);
  const filters = make("div", { class: "filters" });
  filters.append(setting.label, subtask.label, method.label, only.label, labelled);
  for (const one of [setting.list, subtask.list, method.list, only.list]) one.addEventListener("change", update);
  search.addEventListener("input", update);
  more.addEventListener("click", extend);
  view.append(filters, count, list, more);
  update();
})();
