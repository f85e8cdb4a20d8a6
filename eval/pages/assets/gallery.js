// The gallery: draws on canvases what every method keeps, for the budget and the point in the model that are chosen.
// The data is made by page_data in gallery.py; "cells" are the patches of all panels, one panel after another in raster order.
(async () => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const get = (id) => document.getElementById(id);
  const layers = data.full.tokens_per_layer.length;
  const starts = []; // the first cell of every panel
  let cells = 0;
  for (const panel of data.panels) {
    starts.push(cells);
    cells += panel.rows * panel.columns;
  }

  // ---- data ----
  const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)).buffer;
  const whole = (text) => new Int32Array(bytes(text));
  const padding = new Set(whole(data.padding));

  // Token and role of every cell: 0 dropped, 1 kept, 2 merged, 3 a patch at which a merged token stands.
  function decode(state) {
    if (state.role) return state;
    const kept = whole(state.patches.kept);
    const token = whole(state.patches.assignment);
    const members = new Int32Array(kept.length);
    for (const index of token) if (index >= 0) members[index] += 1;
    const role = new Uint8Array(cells);
    for (let cell = 0; cell < cells; cell++) if (token[cell] >= 0) role[cell] = 2;
    kept.forEach((cell, index) => cell >= 0 && (role[cell] = members[index] > 1 ? 3 : 1));
    const colours = whole(state.colours);
    const colour = (index) => data.style.palette[colours[index]];
    const count = (number) => role.reduce((sum, one) => sum + (one === number), 0);
    const outside = kept.reduce((sum, cell) => sum + (cell < 0), 0);
    const empty = kept.reduce((sum, cell) => sum + padding.has(cell), 0);
    const dropped = count(0), merged = count(2), targets = count(3);
    return Object.assign(state, { token, role, members, colour, outside, empty, tokens: kept.length, dropped, merged, targets, alone: count(1) });
  }

  const answers = new Map(data.results.map((result) => [`${result.method} ${result.budget}`, result]));
  const reasons = new Map(data.unavailable.map((entry) => [`${entry.method} ${entry.budget}`, entry.reason]));
  const maps = new Map(data.maps.map((map) => [map.key, { ...map, values: new Uint8Array(bytes(map.values)) }]));

  // ---- photographs: as they are, for merged patches (a little grey) and for dropped ones (grey and dim) ----
  const luminance = (p, i) => 0.299 * p[i] + 0.587 * p[i + 1] + 0.114 * p[i + 2];
  function version(image, grey, light) {
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(image, 0, 0);
    const pixels = context.getImageData(0, 0, canvas.width, canvas.height);
    for (let i = 0; i < pixels.data.length; i += 4) {
      const mean = luminance(pixels.data, i);
      for (let c = i; c < i + 3; c++) pixels.data[c] = (pixels.data[c] + (mean - pixels.data[c]) * grey) * light;
    }
    context.putImageData(pixels, 0, 0);
    return canvas;
  }
  const photos = await Promise.all(
    data.images.map(async (source) => {
      const image = new Image();
      image.src = source;
      await image.decode();
      const { grey, dim, faded } = data.style;
      return { image, faded: version(image, faded, 1), dim: version(image, grey, dim) };
    }),
  );

  // ---- colour scale of score maps (viridis: readable for colour-blind readers, brighter is more) ----
  const STOPS = ["#440154", "#3b528b", "#21918c", "#5ec962", "#fde725"];
  const channels = STOPS.map((stop) => [1, 3, 5].map((at) => parseInt(stop.slice(at, at + 2), 16)));
  const ramp = Array.from({ length: 255 }, (_, value) => {
    const place = (value / 254) * (STOPS.length - 1);
    const low = Math.min(Math.floor(place), STOPS.length - 2);
    return `rgb(${channels[low].map((c, i) => Math.round(c + (channels[low + 1][i] - c) * (place - low))).join(" ")})`;
  });
  document.querySelector(".ramp").style.background = `linear-gradient(90deg, ${STOPS.join(", ")})`;
  const short = (value) => (value === 0 ? "0" : Math.abs(value) >= 0.01 ? value.toFixed(2) : value.toExponential(1));

  // ---- drawing ----
  function draw(canvas, number, state, map, opacity) {
    const panel = data.panels[number];
    const photo = photos[panel.image];
    const width = Math.max(1, Math.round(canvas.clientWidth * Math.max(1, window.devicePixelRatio)));
    const height = Math.round((width * photo.image.naturalHeight) / photo.image.naturalWidth);
    if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
    const context = canvas.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.drawImage(photo.image, 0, 0, width, height);
    // Whole pixels as edges of cells, so that neighbours leave no gap.
    const edges = (count, length) => Array.from({ length: count + 1 }, (_, at) => Math.round((at * length) / count));
    const [x, y] = [edges(panel.columns, width), edges(panel.rows, height)];
    const thin = Math.max(1, Math.round(Math.min(width / panel.columns, height / panel.rows) / 12));
    const start = starts[number];
    const each = (visit) => {
      for (let row = 0; row < panel.rows; row++) {
        for (let column = 0; column < panel.columns; column++) {
          const box = [x[column], y[row], x[column + 1] - x[column], y[row + 1] - y[row]];
          if (box[2] > 0 && box[3] > 0) visit(start + row * panel.columns + column, box, row, column);
        }
      }
    };
    const within = (path, image) => {
      context.save();
      context.clip(path);
      context.drawImage(image, 0, 0, width, height);
      context.restore();
    };

    if (state) {
      const [dropped, merged] = [new Path2D(), new Path2D()];
      each((cell, box) => state.role[cell] === 0 && dropped.rect(...box));
      each((cell, box) => state.role[cell] === 2 && merged.rect(...box));
      within(dropped, photo.dim);
      within(merged, photo.faded);
      context.globalAlpha = data.style.tint;
      each((cell, box) => {
        if (state.role[cell] !== 2 || state.members[state.token[cell]] < 2) return;
        context.fillStyle = state.colour(state.token[cell]);
        context.fillRect(...box);
      });
      context.globalAlpha = 1;
    }
    if (map) {
      context.globalAlpha = opacity;
      each((cell, box) => {
        if (map.values[cell] === 255) return;
        context.fillStyle = ramp[map.values[cell]];
        context.fillRect(...box);
      });
      context.globalAlpha = 1;
    }
    if (!state) return;
    const group = (row, column) => {
      const token = state.token[start + row * panel.columns + column];
      return token >= 0 && state.members[token] > 1 ? token : -1;
    };
    each((cell, [left, top, wide, high], row, column) => {
      const own = group(row, column);
      if (own < 0) return;
      context.fillStyle = state.colour(own);
      const frame = state.role[cell] === 3;
      const line = frame ? 2 * thin : thin;
      if (frame || (row > 0 && group(row - 1, column) !== own)) context.fillRect(left, top, wide, line);
      if (frame || (column > 0 && group(row, column - 1) !== own)) context.fillRect(left, top, line, high);
      if (frame || (row + 1 < panel.rows && group(row + 1, column) !== own))
        context.fillRect(left, top + high - line, wide, line);
      if (frame || (column + 1 < panel.columns && group(row, column + 1) !== own))
        context.fillRect(left + wide - line, top, line, high);
    });
  }

  // ---- cards ----
  function element(tag, name, text) {
    const made = document.createElement(tag);
    if (name) made.className = name;
    if (text !== undefined) made.textContent = text;
    return made;
  }
  const columns = data.panels.length > 2 ? Math.min(4, data.panels.length) : data.panels.length;
  get("cards").classList.toggle("wide", data.panels.length > 1);

  function card(name, summary) {
    const box = element("article", "card");
    box.dataset.method = name;
    const title = element("h2", "", name === "full" ? "all tokens" : name);
    const tokens = title.appendChild(element("span", "tokens"));
    const panels = element("div", "panels");
    panels.style.gridTemplateColumns = `repeat(${columns}, minmax(0, 1fr))`;
    const canvases = data.panels.map((panel) => {
      const figure = panels.appendChild(element("figure"));
      const canvas = figure.appendChild(element("canvas"));
      canvas.setAttribute("role", "img");
      if (data.panels.length > 1) figure.append(element("figcaption", "", panel.name));
      return canvas;
    });
    const bars = element("div", "layers");
    bars.setAttribute("role", "img");
    const made = {
      name, box, tokens, panels, canvases, bars,
      answer: element("p", "answer"), counts: element("p", "counts"), caption: element("p", "caption quiet"), reason: element("p", "reason"),
    };
    box.append(title, panels, made.answer, made.counts, bars, made.caption, made.reason, element("p", "quiet", summary));
    get("cards").append(box);
    return made;
  }
  const full = card("full", "The image without reduction; the score map is drawn here.");
  const cards = data.methods.map((method) => {
    const options = Object.entries(method.options).map(([name, value]) => `${name}=${value}`);
    return card(method.name, [...options, method.summary].join(", "));
  });

  function countsOf(state) {
    const parts = [`${state.alone} kept`];
    if (state.targets) parts.push(`${state.merged + state.targets} merged into ${state.targets}`);
    else if (state.merged) parts.push(`${state.merged} merged`);
    parts.push(`${state.dropped} dropped`);
    if (state.outside) parts.push(`${state.outside} token${state.outside > 1 ? "s" : ""} at no patch`);
    const empty = padding.size ? `. ${state.empty} of ${state.tokens} tokens on padding` : "";
    return parts.join(", ") + empty;
  }

  function show(one, result, reason, position, most, map, opacity) {
    for (const part of ["panels", "answer", "counts", "bars", "caption"]) one[part].hidden = !result;
    one.reason.hidden = Boolean(result);
    if (!result) {
      one.tokens.textContent = "";
      one.reason.textContent = reason ? `Not possible here: ${reason}` : "No answer.";
      return;
    }
    const state = decode(result.states[result.at[position]]);
    const mean = result.tokens_per_layer.reduce((sum, count) => sum + count, 0) / layers;
    one.tokens.title = "mean over decoder layers";
    one.tokens.textContent = `${mean.toFixed(mean % 1 ? 1 : 0)} tokens`;
    const same = one !== full && result.text === data.full.text;
    one.answer.textContent = result.text || "(nothing)";
    if (one !== full) one.answer.append(" ", element("span", "quiet", same ? "= same answer" : "≠ other answer"));
    one.counts.textContent = `Patches: ${countsOf(state)}.`;
    const ends = [...new Set([result.tokens_per_layer[0], result.tokens_per_layer[layers - 1]])].join(" to ");
    one.caption.textContent = `Tokens entering layers 0 to ${layers - 1}: ${ends}.`;
    if (one.bars.children.length !== layers) result.tokens_per_layer.forEach(() => one.bars.append(element("i")));
    result.tokens_per_layer.forEach((count, layer) => {
      const bar = one.bars.children[layer];
      bar.style.height = `${Math.max(4, (100 * count) / most)}%`;
      bar.classList.toggle("now", layer === position - 1);
      bar.title = `decoder layer ${layer}: ${count} tokens`;
    });
    one.bars.setAttribute("aria-label", `Visual tokens entering each decoder layer: ${result.tokens_per_layer.join(", ")}`);
    Object.assign(one, { state: one === full ? null : state, map: map ?? maps.get(get("map").value) });
    one.canvases.forEach((canvas, number) => {
      const panel = data.panels.length > 1 ? `, ${data.panels[number].name}` : "";
      canvas.setAttribute("aria-label", `${one.name}${panel}: ${countsOf(state)}`);
      draw(canvas, number, one === full ? null : state, map, opacity);
    });
  }

  // ---- what is under the pointer ----
  // The cell of a panel at a place of its canvas, both in CSS pixels; -1 beside the grid.
  function cellAt(canvas, number, left, top) {
    const { rows, columns } = data.panels[number];
    const row = Math.floor((top * rows) / canvas.clientHeight);
    const column = Math.floor((left * columns) / canvas.clientWidth);
    return row < 0 || column < 0 || row >= rows || column >= columns ? -1 : starts[number] + row * columns + column;
  }

  function describe(one, number, cell) {
    const { columns } = data.panels[number];
    const at = cell - starts[number];
    const words = [`row ${Math.floor(at / columns)}, column ${at % columns}`];
    if (padding.has(cell)) words.push("padding");
    if (one.state) {
      const members = one.state.members[one.state.token[cell]];
      words.push(["dropped", "kept", `merged into a token of ${members} patches`, `${members} patches are merged here`][one.state.role[cell]]);
    }
    if (one.map && one.map.values[cell] !== 255) {
      const { title, low, high, values } = one.map;
      const end = values[cell] === 254 ? "at least " : "";
      words.push(`${title} ${end}${short(low + ((high - low) * values[cell]) / 254)}`);
    }
    return words.join("; ");
  }
  for (const one of [full, ...cards]) {
    one.canvases.forEach((canvas, number) => {
      canvas.addEventListener("pointermove", (event) => {
        const cell = cellAt(canvas, number, event.offsetX, event.offsetY);
        canvas.title = cell < 0 ? "" : describe(one, number, cell);
      });
    });
  }

  // ---- controls ----
  const controls = document.querySelector("form");
  const boxes = [...document.querySelectorAll('input[name="method"]')];
  function update() {
    const budget = data.budgets[Number(get("budget").value)];
    const position = Number(get("layer").value);
    const map = maps.get(get("map").value);
    const opacity = Number(get("opacity").value) / 100;
    const everywhere = get("map-everywhere").checked;
    const chosen = new Set(boxes.filter((box) => box.checked).map((box) => box.value));
    const share = (100 * budget) / data.tokens;
    get("budget-text").textContent = `${budget} of ${data.tokens} tokens (${share.toFixed(1)} %)`;
    get("budget").setAttribute("aria-valuetext", get("budget-text").textContent);
    get("methods-text").textContent = `${chosen.size} of ${boxes.length} shown`;

    const results = cards.map((one) => answers.get(`${one.name} ${budget}`));
    const moving = cards.filter((one, index) => chosen.has(one.name) && results[index] && new Set(results[index].at).size > 1);
    get("layer").disabled = !moving.length;
    const point = moving.length ? position : layers;
    const words = point === 0 ? "after the vision encoder" : `before decoder layer ${point - 1}`;
    get("layer-text").textContent = words;
    get("layer").setAttribute("aria-valuetext", words);
    const more = moving.length > 5 ? ` and ${moving.length - 4} more` : "";
    const names = moving.slice(0, more ? 4 : 5).map((one) => one.name).join(", ") + more;
    get("layer-why").textContent = moving.length
      ? `The layer changes ${names}.`
      : "All methods shown have reduced before this point; choose one that acts inside the decoder.";

    document.querySelector(".map-only").hidden = get("map-meaning").hidden = get("scale").hidden = !map;
    get("opacity-text").textContent = `${Math.round(100 * opacity)} %`;
    if (map) {
      get("scale-low").textContent = short(map.low);
      get("scale-high").textContent = short(map.high);
      get("scale-title").textContent = map.title;
      const above = map.most > map.high ? ` The scale ends where 99 % of the patches lie; the highest is ${short(map.most)}.` : "";
      get("map-meaning").textContent = `${map.title}: ${map.meaning}.${above}`;
    }

    // Bars of all methods have one scale; without reduction there are many times as many tokens.
    const most = Math.max(...results.flatMap((result) => (result ? result.tokens_per_layer : [0])));
    show(full, data.full, "", point, data.full.tokens_per_layer[0], map, opacity);
    cards.forEach((one, index) => {
      one.box.hidden = !chosen.has(one.name);
      if (one.box.hidden) return;
      const reason = reasons.get(`${one.name} ${budget}`);
      show(one, results[index], reason, point, most, everywhere ? map : undefined, opacity);
    });
  }
  controls.addEventListener("input", update);
  controls.addEventListener("submit", (event) => event.preventDefault());
  for (const [id, value] of [["all", true], ["none", false]]) {
    get(id).addEventListener("click", () => {
      for (const box of boxes) box.checked = value;
      update();
    });
  }
  // Canvases follow the width of their cards.
  let width = 0;
  new ResizeObserver(() => {
    const now = get("cards").clientWidth;
    if (now !== width) [width] = [now, update()];
  }).observe(get("cards"));
  update();
  document.body.dataset.ready = "yes";
})();
