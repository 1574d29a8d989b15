/* Draws `view`, what experiments.explorer.views.show makes, into `root`: one canvas a pruner and budget. No library, no
   network; the server's page, saved pages, the report and the Space use this file. `host.choose(n)`, if there is one,
   returns a promise of the same view at n tokens, for the methods whose picks have no order. */
function panels(root, view, host = {}) {
  const DROPPED = 'rgba(255,255,255,.82)', WORD = [213, 94, 0], EARLY_TO_LATE = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
  const make = (tag, parent, props = {}) => parent.appendChild(Object.assign(document.createElement(tag), props));
  const [rows, columns] = view.grid ? view.grid.slice(-2) : [0, 0], n = rows * columns, [left, top, right, bottom] = view.box || [0, 0, 1, 1];
  const state = {question: 0, word: -1, patch: -1, at: -1, hovered: null, first: 0, chosen: null};
  const cells = [], chips = [], image = new Image();
  root.replaceChildren();

  const hasOrder = view.questions.some(q => q.runs.some(run => run.order));
  const most = Math.max(1, ...view.questions.flatMap(q => q.runs.map(run => run.order ? run.order.length : 0)));
  const head = make('div', root, {className: 'top'}), bar = make('div', head, {className: 'bar'}), range = slider(), said = make('p', head, {className: 'said'});
  said.setAttribute('aria-live', 'polite');
  const sides = make('div', root, {className: view.questions.length > 1 ? 'sides two' : 'sides'});
  view.questions.forEach(side);
  if (!view.grid) said.textContent = 'The tokens of this image do not form one grid, so the kept tokens cannot be drawn.';
  image.onload = draw;
  image.src = view.src;

  function slider() {
    if (!hasOrder || !view.grid) return null;
    const label = make('label', bar, {textContent: 'First picks '});
    const input = make('input', label, {type: 'range', min: 0, max: most, value: 0, className: 'range'});
    make('output', bar, {className: 'first'});
    make('span', bar, {className: 'scale', title: 'first to last pick'});
    input.oninput = () => { state.first = +input.value; draw(); };
    input.onchange = () => { if (state.first && host.choose && cells.some(cell => isOpen(cell))) choose(state.first); };
    return input;
  }

  function choose(first) {
    host.choose(first).then(chosen => { if (chosen && state.first === first) { state.chosen = {first, view: chosen}; draw(); } });
  }

  function isOpen(cell) { return !cell.run.order && cell.run.pruner !== 'none' && !cell.run.error; }

  function side(question, number) {
    const part = make('section', sides), title = make('h3', part, {textContent: question.question});
    if (question.expected !== null) make('span', title, {className: 'small', textContent: `  answer: ${question.expected}`});
    const words = make('p', part, {className: 'words'});
    if (question.words.length && view.grid) words.textContent = 'Show the PMI with ';
    if (view.grid) chips.push(question.words.map((word, j) => chip(words, word, number, j)));
    const runs = question.runs, full = runs.find(run => run.pruner === 'none');
    const budgets = [...new Set(runs.filter(run => run !== full).map(run => run.keep))];
    const grid = make('div', part, {className: 'cells'});
    grid.style.setProperty('--budgets', Math.max(1, budgets.length));
    grid.style.setProperty('--columns', (full ? 'minmax(0,1fr) ' : '') + `minmax(0,${Math.max(1, budgets.length)}fr)`);
    if (full) cell(make('div', grid, {className: 'whole'}), full, full, number, 0);
    const others = make('div', grid, {className: 'others'});
    for (const pruner of new Set(runs.filter(run => run !== full).map(run => run.pruner))) {
      const line = make('div', others, {className: 'line'});
      runs.filter(run => run !== full && run.pruner === pruner).forEach(run => cell(line, run, full, number, budgets.indexOf(run.keep)));
    }
  }

  function chip(parent, word, number, j) {
    const button = make('button', parent, {type: 'button', className: 'chip', textContent: word});
    button.onclick = () => {
      const isOn = state.word === j && state.question === number;
      Object.assign(state, {word: isOn ? -1 : j, question: number});
      draw();
    };
    return button;
  }

  function cell(parent, run, full, number, column) {
    const figure = make('figure', parent), name = run.pruner === 'none' ? 'all tokens' : run.label || run.pruner;
    const head = make('div', figure, {className: 'head'});
    make('b', head, {textContent: name});
    const kept = make('span', head), canvas = make('canvas', figure, {tabIndex: 0});
    canvas.setAttribute('role', 'img');
    const one = {canvas, run, number, column, figure, kept, name};
    cells.push(one);
    if (run.error) make('p', figure, {className: 'changed', textContent: run.error});
    else answer(make('figcaption', figure), run, full);
    if (run.command) {
      const box = make('details', figure);
      make('summary', box, {textContent: 'Run it yourself'});
      make('pre', box, {textContent: `${run.command}\n\n${run.python}`});
    }
    if (view.grid) listen(one);
  }

  function answer(caption, run, full) {
    const isSame = full ? run.answer === full.answer : run.right !== false;
    const line = make('div', caption, {className: 'answer ' + (isSame ? 'same' : 'changed')});
    const sign = !full || run === full ? '' : isSame ? '= ' : '≠ ', mark = run.right === null ? '' : run.right ? ' ✓' : ' ✗';
    line.textContent = sign + (run.answer || '(empty answer)') + mark;
    line.title = [sign && (isSame ? 'same answer as with all tokens' : 'not the answer with all tokens'), mark && (run.right ? 'right' : 'wrong')].filter(Boolean).join('; ');
    if (run.prompt_tokens) make('div', caption, {className: 'small', textContent: `${run.prompt_tokens} prompt tokens, ${run.layer_mean.toFixed(0)} visual tokens per layer, ${run.ms.toFixed(0)} ms`});
  }

  function listen(one) {
    const at = event => {
      const frame = one.canvas.getBoundingClientRect(), [w, h] = view.size;
      const column = Math.floor(((event.clientX - frame.left) / frame.width * w - left) / (right - left) * columns);
      const row = Math.floor(((event.clientY - frame.top) / frame.height * h - top) / (bottom - top) * rows);
      return column >= 0 && column < columns && row >= 0 && row < rows ? row * columns + column : -1;
    };
    const pin = patch => { state.patch = state.patch === patch ? -1 : patch; Object.assign(state, {at: patch, hovered: one, question: one.number}); draw(); };
    one.canvas.onpointermove = event => { Object.assign(state, {at: at(event), hovered: one}); tell(); };
    one.canvas.onpointerleave = () => { Object.assign(state, {at: -1, hovered: null}); tell(); };
    one.canvas.onclick = event => pin(at(event));
    one.canvas.onkeydown = event => {
      const step = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns}[event.key];
      if (step !== undefined) {
        const from = state.patch < 0 ? Math.floor(rows / 2) * columns + Math.floor(columns / 2) : state.patch + step;
        if (from >= 0 && from < n) { state.patch = -1; pin(from); }
      } else if (event.key === 'Escape') { Object.assign(state, {patch: -1, word: -1}); draw(); } else return;
      event.preventDefault();
    };
  }

  function shown(one) {  // tokens that a panel shows, and the order of the picks
    const run = one.run;
    if (!state.first || run.pruner === 'none' || run.error) return {kept: run.kept || [], order: null};
    if (run.order) return {kept: run.order.slice(0, state.first), order: run.order};
    const other = state.chosen && state.chosen.first === state.first && state.chosen.view.questions[one.number].runs.find(r => r.pruner === run.pruner && !r.error);
    return {kept: other ? other.kept : run.kept, order: null, isOld: !other};
  }

  function tell() {
    if (!view.grid) return;
    const patch = state.at >= 0 ? state.at : state.patch, question = view.questions[state.hovered ? state.hovered.number : state.question];
    if (patch < 0) {
      const word = state.word >= 0 && view.questions[state.question].words[state.word];
      said.textContent = word ? `Orange: patches with a positive PMI with “${word}”. Click a patch to see its words.` : 'Click a word to see its patches, or a patch to see its words. Faded patches were dropped.';
      return;
    }
    const parts = [`Patch in row ${Math.floor(patch / columns) + 1}, column ${patch % columns + 1}`];
    if (state.hovered) {
      const {kept, order} = shown(state.hovered), pick = order ? order.indexOf(patch) + 1 : 0;
      if (state.hovered.run.pruner !== 'none') parts[0] += ` of ${state.hovered.name}: ` + (kept.includes(patch) ? pick ? `pick ${pick}` : 'kept' : 'dropped');
    }
    if (question.pmi) {
      const best = question.words.map((word, j) => [word, question.pmi[j][patch]]).sort((a, b) => b[1] - a[1]).slice(0, 3);
      parts.push('in the question: ' + best.map(([word, value]) => `${word} ${value.toFixed(1)}`).join(', '));
    }
    if (view.vocabulary) parts.push('in the whole vocabulary: ' + view.vocabulary[patch].map(([word, value]) => `${word} ${value.toFixed(1)}`).join(', '));
    said.textContent = parts.join(' · ');
  }

  function draw() {
    chips.forEach((line, number) => line.forEach((button, j) => button.setAttribute('aria-pressed', state.word === j && state.question === number)));
    if (range) root.querySelector('.first').textContent = state.first ? `${state.first} (the answers do not change)` : 'drag to see the order';
    root.classList.toggle('ordering', state.first > 0);
    cells.forEach(paint);
    tell();
  }

  function colour(share) {
    const x = share * (EARLY_TO_LATE.length - 1), k = Math.min(Math.floor(x), EARLY_TO_LATE.length - 2);
    return `rgb(${EARLY_TO_LATE[k].map((a, c) => Math.round(a + (EARLY_TO_LATE[k + 1][c] - a) * (x - k)))})`;
  }

  function paint(one) {
    const {canvas, run, number} = one, [w, h] = view.size, scale = 400 / w, {kept, order, isOld} = shown(one), has = new Set(kept);
    one.figure.hidden = state.first > 0 && one.column > 0;  // the columns would be equal
    const total = run.n_visual, count = run.error ? '' : run.pruner === 'none' ? ` ${total}` : ` ${kept.length} of ${total}`;
    one.kept.textContent = count + (isOld ? ' (no order: kept tokens at this budget)' : '');
    canvas.setAttribute('aria-label', `${one.name}:${count} tokens kept${run.error ? '' : ', answer ' + run.answer}`);
    canvas.width = 400;
    canvas.height = Math.round(h * scale);
    const g = canvas.getContext('2d');
    g.drawImage(image, 0, 0, canvas.width, canvas.height);
    if (!view.grid || run.error) return;
    const x = k => Math.round((left + k * (right - left) / columns) * scale), y = k => Math.round((top + k * (bottom - top) / rows) * scale);
    const box = k => { const [r, c] = [Math.floor(k / columns), k % columns]; return [x(c), y(r), x(c + 1) - x(c), y(r + 1) - y(r)]; };
    const heat = state.word >= 0 && state.question === number ? view.questions[number].pmi[state.word] : null;
    const peak = heat && Math.max(...view.questions[number].pmi.map(row => Math.max(...row)));
    const isFull = run.pruner === 'none' || kept.length >= n;
    for (let k = 0; k < n; k++) {
      if (!isFull && !has.has(k)) { g.fillStyle = DROPPED; g.fillRect(...box(k)); }
      if (heat && heat[k] > 0) { g.fillStyle = `rgba(${WORD},${.75 * heat[k] / peak})`; g.fillRect(...box(k)); }
    }
    const line = (k, style, width) => { const [a, b, c, d] = box(k); g.strokeStyle = style; g.lineWidth = width; g.strokeRect(a + width / 2, b + width / 2, c - width, d - width); };
    if (order) kept.forEach((k, i) => line(k, colour(i / Math.max(1, kept.length - 1)), 3));
    else if (heat && !isFull) kept.forEach(k => line(k, '#0072b2', 2));
    if (state.patch >= 0) { line(state.patch, '#fff', 5); line(state.patch, '#000', 2.5); }
  }
}
