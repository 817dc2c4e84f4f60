"use strict";
// The browser of single decisions. All that comes from runs is set as text, never as markup.
(() => {
  const byId = (id) => document.getElementById(id);
  const make = (name, words, attributes = {}) => {
    const element = document.createElement(name);
    if (words !== undefined) element.textContent = words;
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    return element;
  };

  // Tables are folded on the screen and open on paper.
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open])")].filter((one) => one.id !== "all");
    for (const one of opened) one.open = true;
  });
  addEventListener("afterprint", () => { for (const one of opened) one.open = false; });

  const source = byId("document");
  if (!source) return;
  const { scale, runs } = JSON.parse(source.textContent);
  const [runBox, problemBox, layerBox, shadeBox] = ["run", "problem", "layer", "shade"].map(byId);
  const list = byId("tokens"), table = byId("all").querySelector(".scroll");
  let place = 0, chosenShade = false;

  const fill = (box, words) => {
    const before = box.selectedIndex;
    box.replaceChildren(...words.map((one, index) => make("option", one, { value: index })));
    box.selectedIndex = before >= 0 && before < words.length ? before : 0;
  };
  const run = () => runs[runBox.selectedIndex];
  const problem = () => run().problems[problemBox.selectedIndex];
  const layer = () => problem().layers[layerBox.selectedIndex];
  const weight = (one) => (one === null ? "not a number" : (one / scale).toFixed(3));
  const seen = (token) => token.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll("\r", "␍");

  // Experts by falling weight: [expert, weight].
  const ranked = (of, token) =>
    of.i[token].map((expert, slot) => [expert, of.w[token][slot]]).sort((a, b) => b[1] - a[1]);

  const shades = () => [
    ["number of experts", (of, token) => of.i[token].length, (value) => value],
    ["largest weight", (of, token) => Math.max(0, ...of.w[token]), weight],
    ...Array.from({ length: run().experts }, (_, expert) => [
      `weight of expert ${expert}`,
      (of, token) => of.w[token][of.i[token].indexOf(expert)] ?? 0,
      weight,
    ]),
  ];

  const shade = () => {
    const [words, value, show] = shades()[shadeBox.selectedIndex];
    const values = problem().tokens.map((_, token) => value(layer(), token));
    const low = Math.min(...values), high = Math.max(...values);
    [...list.children].forEach((element, token) => {
      element.style.setProperty("--share", high > low ? (values[token] - low) / (high - low) : 0);
    });
    const key = (share) => {
      const box = make("span", undefined, { class: "key", "aria-hidden": "true" });
      box.style.background = `color-mix(in srgb, var(--series-6) ${55 * share}%, transparent)`;
      return box;
    };
    byId("scale").replaceChildren(
      ...(high > low
        ? [`${words}: `, key(0), ` ${show(low)} to `, key(1), ` ${show(high)}. `]
        : [`${words}: ${values.length ? show(low) : "–"} for every token. `]),
      "Underlined tokens are the model’s output.",
    );
  };

  const choose = (token, reveal = true) => {
    const count = problem().tokens.length;
    if (!count) return;
    place = Math.min(Math.max(token, 0), count - 1);
    for (const one of list.querySelectorAll("[aria-selected=true]")) one.setAttribute("aria-selected", "false");
    const element = list.children[place];
    element.setAttribute("aria-selected", "true");
    list.setAttribute("aria-activedescendant", element.id);
    if (reveal) element.scrollIntoView({ block: "nearest", inline: "nearest" });
    const side = place < problem().prompt ? "prompt" : "output";
    byId("token-title").textContent =
      `Token ${place + 1} of ${count}, “${seen(problem().tokens[place])}” (${side}), layer ${layerBox.selectedIndex}`;
    showChosen();
    showMap();
  };

  const showChosen = () => {
    const found = ranked(layer(), place);
    const top = Math.max(1, ...found.map(([, one]) => one));
    const rows = found.map(([expert, one]) => {
      const bar = make("span", undefined, { class: "bar", "aria-hidden": "true" });
      bar.style.width = `${Math.max(0, (9 * one) / top)}em`;
      const row = make("tr"), cell = make("td");
      cell.append(bar);
      row.append(make("th", `expert ${expert}`, { scope: "row" }), make("td", weight(one), { class: "number" }), cell);
      return row;
    });
    const result = make("table");
    result.append(make("caption", found.length ? "Experts of this token in this layer" : "No expert in this layer"), ...rows);
    byId("chosen").replaceChildren(result);
  };

  // Layers down, experts across; the darker, the larger the weight within the layer.
  const showMap = () => {
    const layers = problem().layers, experts = run().experts;
    const name = (kind, attributes) => {
      const element = document.createElementNS("http://www.w3.org/2000/svg", kind);
      for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
      return element;
    };
    const step = Math.min(14, 560 / experts), left = 26, width = left + step * experts, height = 14 * layers.length + 16;
    const drawing = name("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", style: `max-width:${width * 1.4}px` });
    const words = layers.map((of, row) => {
      const found = ranked(of, place), y = 14 * row;
      const label = name("text", { x: left - 5, y: y + 10, "text-anchor": "end" });
      label.textContent = row;
      drawing.append(label, name("rect", { class: "back", x: left, y: y + 1, width: step * experts, height: 12 }));
      const top = Math.max(1, ...found.map(([, one]) => one));
      for (const [expert, one] of found) {
        const opacity = Math.min(1, 0.25 + 0.75 * Math.max(0, one / top));
        drawing.append(
          name("rect", { class: "cell", x: left + step * expert, y: y + 1, width: Math.max(step - 1, 1), height: 12, opacity }),
        );
      }
      if (row === layerBox.selectedIndex) {
        drawing.append(name("rect", { class: "here", x: left, y: y + 1, width: step * experts, height: 12 }));
      }
      return `layer ${row}: ${found.map(([expert, one]) => `${expert} (${weight(one)})`).join(", ") || "none"}`;
    });
    for (const expert of new Set([0, experts >> 1, experts - 1])) {
      const label = name("text", { x: left + step * (expert + 0.5), y: height - 3, "text-anchor": "middle" });
      label.textContent = expert;
      drawing.append(label);
    }
    drawing.setAttribute("aria-label", `Experts of this token in every layer. ${words.join("; ")}`);
    byId("map").replaceChildren(make("p", "This token in every layer (rows), by expert (columns)", { class: "quiet" }), drawing);
  };

  const showAll = () => {
    if (!byId("all").open) return;
    const result = make("table"), head = make("tr"), body = make("tbody"), top = make("thead");
    for (const words of ["token", "text", "experts", "experts and weights"]) head.append(make("th", words, { scope: "col" }));
    top.append(head);
    problem().tokens.forEach((token, index) => {
      const found = ranked(layer(), index), row = make("tr");
      row.append(
        make("th", index + 1, { scope: "row" }), make("td", seen(token)), make("td", found.length, { class: "number" }),
        make("td", found.map(([expert, one]) => `${expert} (${weight(one)})`).join(", ")),
      );
      body.append(row);
    });
    result.append(make("caption", `Layer ${layerBox.selectedIndex}`), top, body);
    table.replaceChildren(result);
  };

  const showProblem = () => {
    const { tokens, prompt, answer } = problem();
    list.replaceChildren(...tokens.map((token, index) => {
      const element = make("span", token.replaceAll("\n", "⏎\n") || "∅", { role: "option", id: `t${index}`, "aria-selected": "false" });
      element.setAttribute("aria-label", seen(token));
      if (index >= prompt) element.classList.add("output");
      return element;
    }));
    byId("answer").textContent = answer || "–";
    fill(layerBox, problem().layers.map((of, index) => `${index}${of.gate ? `: ${of.gate}` : ""}`));
    showLayer();
  };
  const showLayer = () => { shade(); choose(place, false); showAll(); };
  const showRun = () => {
    fill(problemBox, run().problems.map((one) => `${one.index}: ${one.question.slice(0, 70)}`));
    fill(shadeBox, shades().map(([words]) => words));
    // A router that always takes as many experts shows nothing by their number.
    const sizes = new Set(problem().layers.flatMap((of) => of.i.map((found) => found.length)));
    if (!chosenShade) shadeBox.selectedIndex = sizes.size > 1 ? 0 : 1;
    showProblem();
  };

  // The token above or below: the one on the next line whose middle is nearest.
  const beside = (direction) => {
    const boxes = [...list.children].map((one) => one.getClientRects()[0]);
    const from = boxes[place], middle = (box) => box.left + box.width / 2;
    let best = place, line = null;
    for (let token = place + direction; token >= 0 && token < boxes.length; token += direction) {
      const moved = Math.abs(boxes[token].top - from.top) > from.height / 2;
      if (!moved) continue;
      line ??= boxes[token].top;
      if (Math.abs(boxes[token].top - line) > from.height / 2) break;
      if (best === place || Math.abs(middle(boxes[token]) - middle(from)) < Math.abs(middle(boxes[best]) - middle(from))) best = token;
    }
    return best;
  };
  const keys = {
    ArrowRight: () => place + 1, ArrowLeft: () => place - 1, ArrowDown: () => beside(1), ArrowUp: () => beside(-1),
    Home: () => 0, End: () => problem().tokens.length - 1,
  };
  list.addEventListener("keydown", (event) => {
    if (!(event.key in keys) || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    choose(keys[event.key]());
  });
  list.addEventListener("click", (event) => {
    const found = event.target.closest("[role=option]");
    if (found) choose([...list.children].indexOf(found));
  });
  runBox.addEventListener("change", showRun);
  problemBox.addEventListener("change", () => { place = 0; showProblem(); });
  layerBox.addEventListener("change", showLayer);
  shadeBox.addEventListener("change", () => { chosenShade = true; shade(); });
  byId("all").addEventListener("toggle", showAll);

  fill(runBox, runs.map((one) => `${one.title}${one.seed === null ? "" : `, seed ${one.seed}`}`));
  byId("browser").hidden = false;
  showRun();
})();
